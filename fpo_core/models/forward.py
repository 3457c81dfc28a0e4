"""One forward pass of a model over a batch of pairs: what every stage reads from a model.

The offline reference pass, training and evaluation all come through here, so that policy and
reference are computed by the same code on the same positions.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from fpo_core.data.batches import PairBatch, attention_mask
from fpo_core.hookpoint import Hookpoint
from fpo_core.logprobs import output_head, selected_logps, sum_by_response
from fpo_core.models.hooks import StopForward, capture_activations


class PairForward(NamedTuple):
    """Quantities at the scored positions (N) and of the responses (R)."""

    logps: Tensor  # [R] float64, summed over scored tokens
    hidden: Tensor  # [N, d_model] final hidden states, after the final norm
    activations: tuple[Tensor, ...]  # [N, d_model] at each hookpoint


def forward_pairs(model: Any, batch: PairBatch, hookpoints: Sequence[Hookpoint]) -> PairForward:
    """Log-probs of both responses and the activations at the SAEs' hookpoints.

    Args:
        model: causal LM; gradients flow when they are enabled.
        batch: the pairs.
        hookpoints: where the SAEs read.
    """
    with capture_activations(model, hookpoints) as capture:
        hidden = _decoder(model, batch)
    scored = at_scored(hidden, batch)
    logps = selected_logps(scored, output_head(model), batch.targets)
    return PairForward(
        sum_by_response(logps, batch.response, len(batch.lengths)),
        scored,
        tuple(at_scored(capture[hookpoint], batch) for hookpoint in hookpoints),
    )


def scored_activations(
    model: Any, batch: PairBatch, hookpoints: Sequence[Hookpoint]
) -> tuple[Tensor, ...]:
    """The activations [N, d_model] alone: blocks after the deepest and the head do not run."""
    capturing = capture_activations(model, hookpoints, stop=True)
    with capturing as capture, suppress(StopForward):
        _decoder(model, batch)
    return tuple(at_scored(capture[hookpoint], batch) for hookpoint in hookpoints)


def scored_hidden(model: Any, batch: PairBatch) -> Tensor:
    """The final hidden states [N, d_model] alone."""
    return at_scored(_decoder(model, batch), batch)


def at_scored(values: Tensor, batch: PairBatch) -> Tensor:
    """Values [B, T, d] at the scored positions, as [N, d]."""
    return values.flatten(0, 1)[batch.positions]


def _decoder(model: Any, batch: PairBatch) -> Tensor:
    decoder = model.get_decoder()
    return decoder(
        input_ids=batch.input_ids,
        attention_mask=attention_mask(batch, model.config, model.dtype),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
