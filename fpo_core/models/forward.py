"""One forward pass of a model over a batch of pairs: what every stage reads from a model.

The offline reference pass, training and evaluation all come through here, so that policy and
reference are computed by the same code on the same positions.
"""

from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from fpo_core.data.batches import PairBatch, attention_mask
from fpo_core.logprobs import output_head, selected_logps, sum_by_response
from fpo_core.models.hooks import StopForward, capture_resid_post


class PairForward(NamedTuple):
    """Quantities at the scored positions (N) and of the responses (R)."""

    logps: Tensor  # [R] float64, summed over scored tokens
    hidden: Tensor  # [N, d_model] final hidden states, after the final norm
    activations: Tensor  # [N, d_model] the SAE's hookpoint


def forward_pairs(model: Any, batch: PairBatch, layer: int) -> PairForward:
    """Log-probs of both responses and the activations after block ``layer``.

    Args:
        model: causal LM; gradients flow when they are enabled.
        batch: the pairs.
        layer: decoder block of the SAE, from 0.
    """
    with capture_resid_post(model, layer) as capture:
        hidden = _decoder(model, batch)
    scored = at_scored(hidden, batch)
    logps = selected_logps(scored, output_head(model), batch.targets)
    return PairForward(
        sum_by_response(logps, batch.response, len(batch.lengths)),
        scored,
        at_scored(capture.value, batch),
    )


def scored_activations(model: Any, batch: PairBatch, layer: int) -> Tensor:
    """The activations [N, d_model] alone: blocks after ``layer`` and the head do not run."""
    with capture_resid_post(model, layer, stop=True) as capture, suppress(StopForward):
        _decoder(model, batch)
    return at_scored(capture.value, batch)


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
