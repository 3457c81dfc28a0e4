"""Log-probabilities without the logits.

Tokens x vocabulary is never held: logits are made in chunks of tokens, and again in backward.
All chunks add into one weight-gradient buffer (plain checkpointing would hold one a chunk).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpo_core import logprob_kernel
from fpo_core.errors import FPOError

# Fewer would save little more, and each chunk goes over the whole weight gradient once.
CHUNK_TOKENS = 256


class Head(NamedTuple):
    """A language model's output head: softcap * tanh(scale * hidden @ weight.T / softcap)."""

    weight: Tensor  # [V, d_model]
    softcap: float | None = None  # Gemma-2's final soft-capping; None: none
    scale: float = 1.0  # Cohere's logit_scale, the inverse of Granite's logits_scaling


def output_head(model: Any) -> Head:
    """The head of a causal LM (tied or not).

    Raises:
        FPOError: for a head with a bias, which is not implemented.
    """
    head: nn.Module = model.get_output_embeddings()
    config = model.config
    if getattr(head, "bias", None) is not None:
        raise FPOError(f"{type(model).__name__}: output heads with a bias are not supported")
    weight = head.weight
    assert isinstance(weight, Tensor)
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(weight, getattr(config, "final_logit_softcapping", None), scale)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """Logits [n, V] of a chunk of hidden states [n, d_model], in float32 (float64 stays)."""
    logits = hidden @ head.weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.scale != 1.0:
        logits *= head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def selected_logps(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """log p(target) at each scored position.

    On CUDA the cut-cross-entropy kernel computes them where it applies (``logprob_kernel``).

    Args:
        hidden: [N, d_model] final hidden states at the scored positions.
        head: the output head.
        targets: [N] token ids.
        chunk: tokens whose logits are held at a time.

    Returns:
        [N] float32, differentiable in ``hidden`` and ``head.weight``.
    """
    weight, softcap, scale = head

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        result = _SelectedLogps.apply(hidden, weight, targets, softcap, scale, chunk)
        assert isinstance(result, Tensor)
        return result

    if logprob_kernel.applies(hidden, weight, softcap):
        kernel = functools.partial(logprob_kernel.kernel_logps, softcap=softcap, scale=scale)
        if logprob_kernel.agrees(kernel, plain, hidden, weight, targets, (softcap, scale)):
            return kernel(hidden, weight, targets)
    return plain(hidden, weight, targets)


def kl_divergences(
    reference: Tensor, reference_head: Head, policy: Tensor, policy_head: Head,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:  # fmt: skip
    """KL(reference || policy) in nats at each position, from both models' hidden states.

    Args:
        reference: [N, d_model] the reference's final hidden states; gets no gradient.
        reference_head: its head.
        policy: [N, d_model] the policy's.
        policy_head: its head.
        chunk: tokens whose logits are held at a time, of both models.

    Returns:
        [N] float32, differentiable in ``policy`` and ``policy_head.weight``.
    """
    result = _KLDivergences.apply(
        policy, policy_head.weight, policy_head.softcap, policy_head.scale,
        reference.detach(), reference_head, chunk,
    )  # fmt: skip
    assert isinstance(result, Tensor)
    return result


class _SelectedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None,
        scale: float, chunk: int,
    ) -> Tensor:  # fmt: skip
        head = Head(weight, softcap, scale)
        logps = _float_like(hidden, len(targets))
        normalizers = torch.empty_like(logps)
        for part in _chunks(len(targets), chunk):
            logits = logits_of(hidden[part], head)
            normalizers[part] = torch.logsumexp(logits, -1)
            logps[part] = logits.gather(1, targets[part, None]).squeeze(1) - normalizers[part]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.head, ctx.chunk = (softcap, scale), chunk
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, normalizers = ctx.saved_tensors
        (grad,) = grads
        head = Head(weight, *ctx.head)
        gradients = _HeadGradients(hidden, head, wants_weight=ctx.needs_input_grad[1])
        for part in _chunks(len(targets), ctx.chunk):
            logits = logits_of(hidden[part], head)
            # d logp / d logit = onehot(target) - softmax, in place: soft-capping alone needs logits
            slope = logits if head.softcap is None else logits.clone()
            slope = slope.sub_(normalizers[part, None]).exp_().neg_()
            slope[torch.arange(len(slope), device=slope.device), targets[part]] += 1
            gradients.add(part, slope.mul_(grad[part, None]), logits)
        return gradients.hidden, gradients.weight, None, None, None, None


class _KLDivergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, softcap: float | None, scale: float,
        reference: Tensor, reference_head: Head, chunk: int,
    ) -> Tensor:  # fmt: skip
        head = Head(weight, softcap, scale)
        result = _float_like(hidden, len(hidden))
        for part in _chunks(len(hidden), chunk):
            ref = torch.log_softmax(logits_of(reference[part], reference_head), -1)
            pol = torch.log_softmax(logits_of(hidden[part], head), -1)
            result[part] = (ref.exp() * (ref - pol)).sum(-1)
        ctx.save_for_backward(hidden, weight, reference, reference_head.weight)
        ctx.head, ctx.chunk = (softcap, scale), chunk
        ctx.reference_head = reference_head[1:]
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, reference, reference_weight = ctx.saved_tensors
        (grad,) = grads
        head, other = Head(weight, *ctx.head), Head(reference_weight, *ctx.reference_head)
        gradients = _HeadGradients(hidden, head, wants_weight=ctx.needs_input_grad[1])
        for part in _chunks(len(hidden), ctx.chunk):
            logits = logits_of(hidden[part], head)
            # d KL / d logit of the policy = p_policy - p_reference
            slope = torch.softmax(logits, -1)
            slope -= torch.softmax(logits_of(reference[part], other), -1)
            gradients.add(part, slope.mul_(grad[part, None]), logits)
        return gradients.hidden, gradients.weight, None, None, None, None, None


class _HeadGradients:
    """Takes gradients of logits, chunk by chunk, on to hidden states and the head's weight."""

    def __init__(self, hidden: Tensor, head: Head, *, wants_weight: bool) -> None:
        self.hidden = torch.empty_like(hidden)
        self._inputs, self._head = hidden, head
        self._sum = None
        if wants_weight:
            precise = torch.promote_types(head.weight.dtype, torch.float32)
            self._sum = torch.zeros_like(head.weight, dtype=precise)

    def add(self, part: slice, slope: Tensor, logits: Tensor) -> None:
        """One chunk's d loss / d logits ``slope`` [n, V], which is used up."""
        if self._head.softcap is not None:
            slope *= 1 - (logits / self._head.softcap) ** 2
        if self._head.scale != 1.0:
            slope *= self._head.scale
        if self._sum is not None:
            self._sum.addmm_(slope.T.to(self._sum.dtype), self._inputs[part].to(self._sum.dtype))
        self.hidden[part] = slope.to(self._head.weight.dtype) @ self._head.weight

    @property
    def weight(self) -> Tensor | None:
        """The weight's gradient, in the weight's dtype."""
        return None if self._sum is None else self._sum.to(self._head.weight.dtype)


def _float_like(hidden: Tensor, count: int) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return torch.empty(count, dtype=dtype, device=hidden.device)


@torch.no_grad()
def entropies(hidden: Tensor, head: Head, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Entropy in nats [N] of the next-token distribution at each position."""
    result = _float_like(hidden, len(hidden))
    for part in _chunks(len(hidden), chunk):
        logp = torch.log_softmax(logits_of(hidden[part], head), -1)
        result[part] = -(logp.exp() * logp).sum(-1)
    return result


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def sum_by_response(values: Tensor, response: Tensor, responses: int) -> Tensor:
    """Sum per-token values [N] into responses [R], in float64 so that the order cannot matter."""
    zeros = torch.zeros(responses, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, response, values.double())
