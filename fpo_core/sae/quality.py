"""How good an SAE is at a place of a model, on text: one measurement for its training's report and
for the gate at attachment (``fpo_core/sae/gate.py``).

- FVU and L0 as ``fpo_core/sae/health.py`` has them, and at other places beside it;
- dead fraction: share of features that fired on none of the tokens;
- cross-entropy recovered: how much of the next-token loss survives when the reconstruction replaces
  the activation, (ablated - spliced) / (ablated - original), with zeros in its place as the floor.

Left out of FVU, L0 and the rest: each row's first position and other attention sinks, whose norms
would outweigh all else. The first position is not spliced either.

Shapes: B rows, T padded length, N tokens, d = d_in.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpo_core.data.batches import batches_by_length
from fpo_core.hookpoint import Hookpoint
from fpo_core.logprobs import output_head, selected_logps
from fpo_core.models.hooks import capture_activations, hooked_module
from fpo_core.progress import Progress, not_shown
from fpo_core.sae.coder import SparseCoder
from fpo_core.sae.collect import SKIP_POSITIONS, no_sinks
from fpo_core.sae.health import health_sums, sae_health

# Nats a token that ablation has to cost, for a share of it to mean anything.
LEAST_COST = 0.01


class Losses(NamedTuple):
    """Next-token loss in nats a token."""

    original: float
    spliced: float  # the reconstruction in the activation's place
    ablated: float  # zeros in its place

    @property
    def recovered(self) -> float | None:
        """Cross-entropy recovered; None where the model hardly needs the activation.

        None, too, where a loss is not finite.
        """
        cost = self.ablated - self.original
        share = (self.ablated - self.spliced) / cost if cost > LEAST_COST else math.nan
        return share if math.isfinite(share) else None


class Fit(NamedTuple):
    """What was measured of an SAE at a place."""

    tokens: int  # without sinks
    fvu: float
    l0: float
    dead_fraction: float
    losses: Losses
    sample: dict[Hookpoint, float]  # FVU at this and other places, on the same fewer tokens
    scale: float  # that gives the activations a mean norm of sqrt(d)
    scaled_fvu: float  # of the activations times it, on the sample


class _Rows(NamedTuple):
    """Rows of one batch, padded on the right: a causal model's tokens do not see padding."""

    ids: Tensor  # [B, T] int64
    kept: Tensor  # [B, T] bool: tokens that are measured, sinks aside

    def loss(self, model: Any, hidden: Tensor) -> float:
        """Summed next-token loss of final hidden states [B, T, d_model]."""
        ahead = self.kept[:, 1:]  # every token but a row's first is predicted
        logps = selected_logps(hidden[:, :-1][ahead], output_head(model), self.ids[:, 1:][ahead])
        return -float(logps.double().sum())


@torch.no_grad()
def measure_sae(
    model: Any,
    coder: SparseCoder,
    hookpoint: Hookpoint,
    rows: Sequence[Sequence[int]],
    *,
    spliced: int | None = None,
    beside: Sequence[Hookpoint] = (),
    sample: int = 512,
    tokens_per_batch: int = 1024,
    on_tokens: Callable[[int], None] = not_shown,
) -> Fit:
    """Measure an SAE at a place: one forward pass, two more of the rows that are spliced.

    Args:
        model: the language model.
        coder: the SAE with its decoder, on the model's device.
        hookpoint: where it reads.
        rows: token ids of texts, each of two tokens at least; the model sees each by itself.
        spliced: on how many of the rows, from the first on, the losses are measured; None: all.
        beside: further places, whose FVU is taken of the same activations' tokens.
        sample: tokens, about, that those are measured on.
        tokens_per_batch: most tokens a forward pass, padding included; a longer row goes alone.
        on_tokens: told of the tokens of each pass.
    """
    first = len(rows) if spliced is None else spliced
    every = max(1, sum(len(row) - SKIP_POSITIONS for row in rows) // sample)
    places = [hookpoint, *(place for place in beside if place != hookpoint)]
    fired = torch.zeros(coder.d_sae, dtype=torch.bool, device=model.device)
    sums: list[Tensor] = []
    sampled: dict[Hookpoint, list[Tensor]] = {place: [] for place in places}
    loss = torch.zeros(3, dtype=torch.float64)
    predicted = 0
    for part, with_losses in ((rows[:first], True), (rows[first:], False)):
        for batch in _batches(part, tokens_per_batch, str(model.device)):
            with capture_activations(model, places) as capture:
                hidden = _hidden(model, batch.ids)
            x = capture[hookpoint][batch.kept]
            sums.append(_sums(coder, no_sinks(x), fired))
            for place in places:
                sampled[place].append(capture[place][batch.kept][::every])
            on_tokens(int(batch.kept.sum()))
            if with_losses:
                passes = (hidden, *_edited(model, hookpoint, batch, x, coder))
                loss += torch.tensor([batch.loss(model, states) for states in passes])
                predicted += len(x)
                on_tokens(2 * len(x))
    health = sae_health(torch.cat(sums).sum(0, keepdim=True))
    tokens = int(torch.cat(sums)[:, 0].sum())
    whole = {place: no_sinks(torch.cat(parts)) for place, parts in sampled.items()}
    norm = float(whole[hookpoint].float().norm(dim=1).mean())
    scale = coder.d_in**0.5 / norm if norm else 1.0  # nothing makes more of zeros
    return Fit(
        tokens, health["fvu"].value, health["l0"].value, 1 - float(fired.float().mean()),
        Losses(*(loss / predicted).tolist()),
        {place: _fvu(coder, x) for place, x in whole.items()},
        scale, _fvu(coder, whole[hookpoint] * scale),
    )  # fmt: skip


def sae_quality(
    model: Any, coder: SparseCoder, hookpoint: Hookpoint, windows: Tensor
) -> dict[str, Any]:
    """What ``quality.json`` says of an SAE.

    Args:
        model: the language model.
        coder: the SAE, on the model's device.
        hookpoint: where it reads.
        windows: token ids [windows, length] that were not trained on.
    """
    total = 3 * windows.shape[0] * (windows.shape[1] - SKIP_POSITIONS)
    with Progress("SAE quality", total=total, unit="token") as progress:
        fit = measure_sae(model, coder, hookpoint, windows.tolist(), on_tokens=progress.advance)
    return {
        "tokens": fit.tokens,
        "l0": fit.l0,
        "fvu": fit.fvu,
        "explained_variance": 1 - fit.fvu,
        "dead_fraction": fit.dead_fraction,
        "loss_original": fit.losses.original,
        "loss_spliced": fit.losses.spliced,
        "loss_zero_ablated": fit.losses.ablated,
        "loss_recovered": fit.losses.recovered,
    }


def _batches(rows: Sequence[Sequence[int]], tokens: int, device: str) -> Iterator[_Rows]:
    for numbers in batches_by_length([len(row) for row in rows], tokens):
        width = max(len(rows[number]) for number in numbers)
        ids = torch.zeros(len(numbers), width, dtype=torch.int64)
        kept = torch.zeros(len(numbers), width, dtype=torch.bool)
        for line, number in enumerate(numbers):
            ids[line, : len(rows[number])] = torch.tensor(rows[number], dtype=torch.int64)
            kept[line, SKIP_POSITIONS : len(rows[number])] = True
        yield _Rows(ids.to(device), kept.to(device))


def _hidden(model: Any, ids: Tensor) -> Tensor:
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def _edited(
    model: Any, hookpoint: Hookpoint, batch: _Rows, x: Tensor, coder: SparseCoder
) -> Iterator[Tensor]:
    """Final hidden states with the reconstruction, then with zeros, in the activations' place."""
    parts = [coder.decode(coder.encode(x[part]), x[part]) for part in coder.chunks(len(x))]
    for values in (torch.cat(parts).to(x.dtype), torch.zeros_like(x)):

        def hook(_module: Any, _inputs: Any, output: Any, values: Tensor = values) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            edited = whole.masked_scatter(batch.kept[:, :, None], values)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        handle = hooked_module(model, hookpoint).register_forward_hook(hook)
        try:
            yield _hidden(model, batch.ids)
        finally:
            handle.remove()


def _sums(coder: SparseCoder, x: Tensor, fired: Tensor | None = None) -> Tensor:
    together = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    return health_sums(coder, x, together, 1, fired)


def _fvu(coder: SparseCoder, x: Tensor) -> float:
    return sae_health(_sums(coder, x))["fvu"].value
