"""Log-probabilities without the logits.

Tokens x vocabulary is never held: logits are made in chunks of tokens, and again in backward.
All chunks add into one weight-gradient buffer (plain checkpointing would hold one a chunk).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpo_core.errors import FPOError

CHUNK_TOKENS = 512


class Head(NamedTuple):
    """A language model's output head."""

    weight: Tensor  # [V, d_model]
    softcap: float | None  # logits = softcap * tanh(logits / softcap), Gemma-2


def output_head(model: Any) -> Head:
    """The head of a causal LM (tied or not).

    Raises:
        FPOError: for a head with a bias or a logit scale, which is not implemented.
    """
    head: nn.Module = model.get_output_embeddings()
    config = model.config
    if getattr(head, "bias", None) is not None or getattr(config, "logit_scale", None):
        raise FPOError(
            f"{type(model).__name__}: heads with a bias or a logit scale are not supported"
        )
    weight = head.weight
    assert isinstance(weight, Tensor)
    return Head(weight, getattr(config, "final_logit_softcapping", None))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """float32 logits [n, V] of a chunk of hidden states [n, d_model]."""
    logits = (hidden @ head.weight.T).float()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def selected_logps(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int = CHUNK_TOKENS
) -> Tensor:
    """log p(target) at each scored position.

    Args:
        hidden: [N, d_model] final hidden states at the scored positions.
        head: the output head.
        targets: [N] token ids.
        chunk: tokens whose logits are held at a time.

    Returns:
        [N] float32, differentiable in ``hidden`` and ``head.weight``.
    """
    result = _SelectedLogps.apply(hidden, head.weight, targets, head.softcap, chunk)
    assert isinstance(result, Tensor)
    return result


class _SelectedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int
    ) -> Tensor:
        head = Head(weight, softcap)
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(logps)
        for part in _chunks(len(targets), chunk):
            logits = logits_of(hidden[part], head)
            normalizers[part] = torch.logsumexp(logits, -1)
            logps[part] = logits.gather(1, targets[part, None]).squeeze(1) - normalizers[part]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.softcap, ctx.chunk = softcap, chunk
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, targets, normalizers = ctx.saved_tensors
        (grad,) = grads
        wants_weight = ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        for part in _chunks(len(targets), ctx.chunk):
            logits = logits_of(hidden[part], Head(weight, ctx.softcap))
            # d logp / d logit = onehot(target) - softmax, times 1 - (logit / cap)^2 for the cap
            slope = torch.exp(logits - normalizers[part, None]).neg_()
            slope[torch.arange(len(slope), device=slope.device), targets[part]] += 1
            slope *= grad[part, None]
            if ctx.softcap is not None:
                slope *= 1 - (logits / ctx.softcap) ** 2
            slope = slope.to(weight.dtype)
            grad_hidden[part] = slope @ weight
            if grad_weight is not None:
                grad_weight.addmm_(slope.T.float(), hidden[part].float())
        cast = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, cast, None, None, None


@torch.no_grad()
def entropies(hidden: Tensor, head: Head, chunk: int = CHUNK_TOKENS) -> Tensor:
    """Entropy in nats [N] of the next-token distribution at each position."""
    result = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for part in _chunks(len(hidden), chunk):
        logp = torch.log_softmax(logits_of(hidden[part], head), -1)
        result[part] = -(logp.exp() * logp).sum(-1)
    return result


@torch.no_grad()
def kl_divergences(
    reference: Tensor, reference_head: Head, policy: Tensor, policy_head: Head,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:  # fmt: skip
    """KL(reference || policy) in nats [N] at each position, from both models' hidden states."""
    result = torch.empty(len(policy), dtype=torch.float32, device=policy.device)
    for part in _chunks(len(policy), chunk):
        ref = torch.log_softmax(logits_of(reference[part], reference_head), -1)
        pol = torch.log_softmax(logits_of(policy[part], policy_head), -1)
        result[part] = (ref.exp() * (ref - pol)).sum(-1)
    return result


def _chunks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def sum_by_response(values: Tensor, response: Tensor, responses: int) -> Tensor:
    """Sum per-token values [N] into responses [R], in float64 so that the order cannot matter."""
    zeros = torch.zeros(responses, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, response, values.double())
