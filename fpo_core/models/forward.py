"""One forward pass of a model over a batch of pairs: what every stage reads from a model.

The offline reference pass, training and evaluation all come through here, so that policy and
reference are computed by the same code on the same positions.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpo_core.data.batches import PairBatch, attention_mask
from fpo_core.data.prompt_rows import PromptCost
from fpo_core.hookpoint import Hookpoint
from fpo_core.logprobs import (
    Head,
    kl_divergences,
    output_head,
    selected_logps,
    sum_by_response,
)
from fpo_core.models.architectures import decoder_layers
from fpo_core.models.attention import inputs_by_parts, is_by_parts, packed
from fpo_core.models.hooks import StopForward, capture_activations


class PairForward(NamedTuple):
    """Quantities at the scored positions (N) and of the responses (R)."""

    logps: Tensor  # [R] float64, summed over scored tokens
    hidden: Tensor  # [N, d_model] final hidden states, after the final norm
    activations: tuple[Tensor, ...]  # [N, d_model] at each hookpoint
    kl: Tensor | None = None  # [R] float64, KL(reference || policy) summed over scored tokens


class ReferenceSide(NamedTuple):
    """A live reference's final hidden states at the scored positions, and its head."""

    hidden: Tensor  # [N, d_model]
    head: Head


def forward_pairs(
    model: Any,
    batch: PairBatch,
    hookpoints: Sequence[Hookpoint],
    reference: ReferenceSide | None = None,
) -> PairForward:
    """Log-probs of both responses and the activations at the SAEs' hookpoints.

    All that reads the head's weight happens in here: under ZeRO-3 it is whole in no other place.

    Args:
        model: causal LM; gradients flow when they are enabled.
        batch: the pairs.
        hookpoints: where the SAEs read.
        reference: a live reference, whose KL is wanted.
    """
    batch = laid_out(model, batch)
    with capture_activations(model, hookpoints) as capture:
        hidden = _decoder(model, batch)
    scored, head = at_scored(hidden, batch), output_head(model)

    def by_response(values: Tensor) -> Tensor:
        return sum_by_response(values, batch.response, len(batch.lengths))

    kl = None
    if reference is not None:
        kl = by_response(kl_divergences(reference.hidden, reference.head, scored, head))
    return PairForward(
        by_response(selected_logps(scored, head, batch.targets)),
        scored,
        tuple(at_scored(capture[hookpoint], batch) for hookpoint in hookpoints),
        kl,
    )


@torch.no_grad()
def reference_side(model: Any, batch: PairBatch) -> ReferenceSide:
    """What a live reference brings to the KL of a batch."""
    return ReferenceSide(scored_hidden(model, batch), output_head(model))


def scored_hidden(model: Any, batch: PairBatch) -> Tensor:
    """Final hidden states [N, d_model] at the scored positions."""
    batch = laid_out(model, batch)
    return at_scored(_decoder(model, batch), batch)


def scored_activations(
    model: Any, batch: PairBatch, hookpoints: Sequence[Hookpoint]
) -> tuple[Tensor, ...]:
    """The activations [N, d_model] alone: blocks after the deepest and the head do not run."""
    batch = laid_out(model, batch)
    capturing = capture_activations(model, hookpoints, stop=True)
    with capturing as capture, suppress(StopForward):
        _decoder(model, batch)
    return tuple(at_scored(capture[hookpoint], batch) for hookpoint in hookpoints)


def at_scored(values: Tensor, batch: PairBatch) -> Tensor:
    """Values [B, T, d] at the scored positions, as [N, d]."""
    return values.flatten(0, 1)[batch.positions]


def laid_out(model: Any, batch: PairBatch) -> PairBatch:
    """The batch as this model takes it: without padding where its attention needs no mask."""
    return packed(batch) if is_by_parts(model.get_decoder().config) else batch


def _decoder(model: Any, batch: PairBatch) -> Tensor:
    decoder = model.get_decoder()
    return decoder(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        **decoder_inputs(model, batch),
    ).last_hidden_state


def decoder_inputs(model: Any, batch: PairBatch) -> dict[str, Any]:
    """What keeps the rows of a batch, and the responses of a row, apart in the decoder."""
    config = model.get_decoder().config
    if is_by_parts(config):
        return inputs_by_parts(batch)
    return {"attention_mask": attention_mask(batch, config, model.dtype)}


# Of attention's products on a GPU what its passes over memory make of them, by implementation:
# Gemma-2-2B's shape in bfloat16 on an H200, 8 pairs of 512 + 768 + 768 tokens in 8 rows and in 16.
GPU_ATTENTION = {"eager": 5.4, "sdpa": 2.4}


def prompt_cost(model: Any) -> PromptCost:
    """What a token, and what attention costs in this model; every block is alike.

    By parts, responses of one row cost each other nothing.
    """
    config = model.get_decoder().config
    block = decoder_layers(model)[0]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    token = 2.0 * sum(parameter.numel() for parameter in block.parameters())
    attention = 0.0 if is_by_parts(config) else 4.0 * heads * width
    if model.device.type == "cuda":
        attention *= GPU_ATTENTION.get(config._attn_implementation, 1.0)
    return PromptCost(token, attention)
