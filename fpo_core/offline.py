"""The offline pass over one shard of pairs: reference log-probs, SAE features, or both at once.

Computing both takes one forward pass; computing only features ends it after the SAE's layer and
never touches the head. Either way the same batches go through the same layers, so an artifact's
bytes do not depend on which of the two was computed beside it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.data.batches import PairBatch, PairIds, batches_by_length, collate
from fpo_core.features.pool import TopFeatures, add_by_response, top_features
from fpo_core.features.stats import FeatureAccumulator
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.forward import forward_pairs, scored_activations
from fpo_core.progress import not_shown
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import SparseCoder

SIDES = ("chosen", "rejected")

Columns = dict[str, Any]


class ShardScores(NamedTuple):
    """Columns of a shard's tables; a part that was not asked for is None."""

    reference: Columns | None
    pooled: Columns | None
    tokens: Columns | None
    stats: Columns | None


@torch.no_grad()
def score_shard(
    model: Any,
    pairs: Sequence[PairIds],
    hookpoint: Hookpoint,
    *,
    coder: SparseCoder | None,
    features: FeatureSettings,
    pinned: Sequence[int] = (),
    want_reference: bool,
    tokens_per_batch: int,
    on_tokens: Callable[[int], None] = not_shown,
) -> ShardScores:
    """Score the pairs of a shard with the frozen reference model.

    Args:
        model: the reference.
        pairs: the shard's pairs, whose order the tables keep.
        hookpoint: where the SAE reads.
        coder: the SAE, on the model's device; None leaves the features out.
        features: what of the features to keep.
        pinned: features whose pooled values are kept whatever they are, ascending.
        want_reference: whether log-probs are wanted.
        tokens_per_batch: most tokens a forward pass, padding included.
        on_tokens: told how many tokens were done after each batch.
    """
    logps = np.zeros((len(pairs), 2))
    collected = _FeatureColumns(len(pairs), coder, features, pinned) if coder else None
    for rows in batches_by_length([pair.length for pair in pairs], tokens_per_batch):
        batch = collate([pairs[row] for row in rows], device=str(model.device))
        if want_reference:
            out = forward_pairs(model, batch, [hookpoint])
            logps[rows] = out.logps.reshape(-1, 2).cpu().numpy()
            (activations,) = out.activations
        else:
            (activations,) = scored_activations(model, batch, [hookpoint])
        if collected:
            collected.add(rows, batch, activations)
        on_tokens(batch.num_tokens)
    reference = _reference_columns(pairs, logps) if want_reference else None
    if not collected:
        return ShardScores(reference, None, None, None)
    return ShardScores(reference, *collected.columns(pairs))


def _reference_columns(pairs: Sequence[PairIds], logps: np.ndarray) -> Columns:
    return {
        "pair_id": [pair.pair_id for pair in pairs],
        "chosen_logp": logps[:, 0],
        "rejected_logp": logps[:, 1],
        "chosen_tokens": np.array([len(pair.chosen) for pair in pairs], dtype=np.int32),
        "rejected_tokens": np.array([len(pair.rejected) for pair in pairs], dtype=np.int32),
    }


class _FeatureColumns:
    """Gathers pooled features, token features and statistics, batch by batch."""

    def __init__(
        self, num_pairs: int, coder: SparseCoder, settings: FeatureSettings, pinned: Sequence[int]
    ) -> None:
        self.coder, self.settings, self.device = coder, settings, coder.b_dec.device
        self.pinned = np.array(pinned, dtype=np.uint32)
        every = coder.d_sae
        self.cache_k = every if settings.cache_k == "all" else min(settings.cache_k, every)
        self.pooled: list[Columns | None] = [None] * (2 * num_pairs)
        self.token_rows: list[list[Columns]] = [[] for _ in range(2 * num_pairs)]
        self.accumulator = FeatureAccumulator(coder.d_sae, settings.examples, self.device)
        self.order: list[tuple[int, int]] = []  # (response, position) of the tokens as they came

    def add(self, rows: list[int], batch: PairBatch, activations: Tensor) -> None:
        responses = [2 * row + side for row in rows for side in (0, 1)]
        counts = batch.lengths.tolist()
        owner = [response for response, n in zip(responses, counts, strict=True) for _ in range(n)]
        place = [position for n in counts for position in range(n)]
        sums = torch.zeros(len(responses), self.coder.d_sae, device=self.device)
        for part in self.coder.chunks(len(activations)):
            acts = self.coder.encode(activations[part])
            add_by_response(sums, acts, batch.response[part])
            self.accumulator.add(acts, len(self.order) + part.start)
            targets = batch.targets[part].tolist()
            self._add_tokens(acts, owner[part], place[part], targets)
        self.order += zip(owner, place, strict=True)
        pooled = sums / batch.lengths[:, None]
        chosen = torch.arange(len(responses), device=self.device) % 2 == 0
        self.accumulator.add_pooled(pooled, chosen)
        self._add_pooled(pooled, responses, counts)

    def _add_tokens(
        self, acts: Tensor, owner: list[int], place: list[int], targets: list[int]
    ) -> None:
        indices, values = top_features(acts, self.settings.tokens_k)
        kept = (values > 0).sum(1).tolist()
        nonzero = (acts > 0).sum(1).tolist()
        values_np = values.cpu().numpy()
        indices_np = indices.cpu().numpy().astype(np.uint32)
        for row, (response, position) in enumerate(zip(owner, place, strict=True)):
            n = kept[row]
            self.token_rows[response].append(
                {
                    "position": position,
                    "token_id": targets[row],
                    "indices": indices_np[row, :n],
                    "values": values_np[row, :n],
                    "nonzero": nonzero[row],
                }
            )

    def _add_pooled(self, pooled: Tensor, responses: list[int], counts: list[int]) -> None:
        # One more than is stored: the first value left out is the cutoff.
        top = TopFeatures(*(found.cpu() for found in top_features(pooled, self.cache_k + 1)))
        pooled = pooled.cpu()
        for row, response in enumerate(responses):
            positive = int((pooled[row] > 0).sum())
            stored = min(positive, self.cache_k)
            self.pooled[response] = {
                "n_tokens": counts[row],
                "indices": top.indices[row, :stored].numpy().astype(np.uint32),
                "values": top.values[row, :stored].numpy(),
                "nonzero": positive,
                "mass": float(pooled[row].sum()),
                "cutoff": float(top.values[row, stored]) if positive > stored else 0.0,
                "pinned": self.pinned,
                "pinned_values": pooled[row].numpy()[self.pinned],
            }

    def columns(self, pairs: Sequence[PairIds]) -> tuple[Columns, Columns, Columns]:
        names = [(pair.pair_id, side) for pair in pairs for side in SIDES]
        pooled = [
            {"pair_id": pair_id, "side": side, **(row or {})}
            for (pair_id, side), row in zip(names, self.pooled, strict=True)
        ]
        tokens = [
            {"pair_id": pair_id, "side": side, **row}
            for (pair_id, side), rows in zip(names, self.token_rows, strict=True)
            for row in rows
        ]
        arrivals = {
            "pair_id": np.array([names[response][0] for response, _ in self.order]),
            "side": np.array([names[response][1] for response, _ in self.order]),
            "position": np.array([position for _, position in self.order]),
        }
        return _transpose(pooled), _transpose(tokens), self.accumulator.columns(arrivals)


def _transpose(rows: list[Columns]) -> Columns:
    return {name: [row[name] for row in rows] for name in rows[0]}
