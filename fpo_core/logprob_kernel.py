"""The cut-cross-entropy kernel (extra ``cuda``): log-probs that never leave the GPU's caches.

Chosen by itself where it applies: half-precision hidden states on a GPU of compute capability 8.0
or more, and a head that release 25.1.1 gets right. It sums gradients in half precision, so a
float32 run never uses it. Before its first use in a process it is compared with the plain path on
the caller's own head; if the two differ by more than rounding, it is not used, and the log says so.
"""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("fpo.kernel")

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> log-probs

HALF = (torch.bfloat16, torch.float16)
CHECKED_TOKENS, CHECKED_ROWS = 64, 8192
# bfloat16 rounds a logit of 16 by 0.06 and a gradient by 0.4 %; a dropped soft-cap is off by nats.
LOGP_TOLERANCE, GRADIENT_TOLERANCE = 0.1, 0.03


def applies(hidden: Tensor, weight: Tensor, softcap: float | None) -> bool:
    """Whether the kernel can serve this head, as far as shapes, dtypes and the machine say."""
    (tokens, width), vocabulary = hidden.shape, len(weight)
    return (
        hidden.is_cuda
        and weight.device == hidden.device
        and supported(hidden.dtype, weight.dtype, tokens, width, vocabulary, softcap)
        and weight.is_contiguous()
        and torch.cuda.get_device_capability(hidden.device) >= (8, 0)
        and is_installed()
    )


def supported(
    dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int, width: int, vocabulary: int,
    softcap: float | None,
) -> bool:  # fmt: skip
    """What release 25.1.1 computes correctly, of what can be asked of it."""
    return (
        dtype in HALF
        and weight_dtype == dtype
        and tokens > 0
        and max(tokens, vocabulary) * width < 2**31  # its offsets are 32 bits
        # With a soft-cap it counts the padding of the last block of 128 tokens as logits of -cap.
        and (softcap is None or vocabulary % 128 == 0)
        and os.environ.get("CCE_AUTOTUNE", "0") == "0"  # which may choose larger blocks
    )


@functools.cache
def is_installed() -> bool:
    """Whether the extra is there."""
    return importlib.util.find_spec("cut_cross_entropy") is not None


def kernel_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, scale: float
) -> Tensor:
    """log p(target) [N] in float32 by the kernel; arguments as of ``selected_logps``."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    scaled = hidden if scale == 1.0 else hidden * scale
    with torch.cuda.device(hidden.device), torch.autocast("cuda", enabled=False):
        losses = linear_cross_entropy(
            scaled, weight, targets, softcap=softcap, reduction="none", impl="cce",
            filter_eps=None,  # no gradient is left out for being small
        )  # fmt: skip
    return -losses


_verdicts: dict[tuple[object, ...], bool] = {}


def agrees(
    kernel: Logps,
    plain: Logps,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: tuple[float | None, float],
) -> bool:
    """Whether a kernel equals the plain path on a few of the caller's tokens; asked once a head.

    Log-probs and the gradient of the hidden states are compared over the whole vocabulary, that of
    the weight over its first 8,192 tokens: over all it would be the largest tensor of the step.
    A kernel that fails is not used either.

    Args:
        kernel: computes log-probs.
        plain: computes the same.
        hidden: [N, d_model].
        weight: [V, d_model].
        targets: [N].
        head: its soft-cap and scale, which with the weight's shape tell heads apart.
    """
    key = (weight.shape, weight.dtype, str(weight.device), head)
    if key not in _verdicts:
        _verdicts[key] = _compare(kernel, plain, hidden, weight, targets)
    return _verdicts[key]


def _compare(
    kernel: Logps, plain: Logps, hidden: Tensor, weight: Tensor, targets: Tensor
) -> bool:  # fmt: skip
    x, ids = hidden[:CHECKED_TOKENS].detach(), targets[:CHECKED_TOKENS]
    rows = weight[:CHECKED_ROWS].detach()
    try:
        whole = [_values(logps, x, weight.detach(), ids) for logps in (kernel, plain)]
        part = [_values(logps, rows, x, ids % len(rows), swap=True) for logps in (kernel, plain)]
    except Exception:  # a compiler's, a driver's, the kernel's own: the plain path is there
        log.warning("cut-cross-entropy kernel not used: it failed", exc_info=True)
        return False
    difference = float((whole[0][0] - whole[1][0]).abs().max())
    relative = max(
        float((one - other).norm() / other.norm()) for (_, one), (_, other) in (whole, part)
    )
    good = difference <= LOGP_TOLERANCE and relative <= GRADIENT_TOLERANCE
    told = "log-probs differ from the plain path's by %.3g, gradients by %.3g of their size"
    if good:
        log.info("cut-cross-entropy kernel in use: its " + told, difference, relative)
    else:
        log.warning("cut-cross-entropy kernel not used: its " + told, difference, relative)
    return good


@torch.enable_grad()
def _values(
    logps: Logps, leaf: Tensor, other: Tensor, targets: Tensor, *, swap: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probs, and the gradient of the first argument (the second is the weight, or ``swap``)."""
    leaf = leaf.clone().requires_grad_()
    found = logps(other, leaf, targets) if swap else logps(leaf, other, targets)
    found.sum().backward()
    assert leaf.grad is not None
    return found.detach(), leaf.grad.float()
