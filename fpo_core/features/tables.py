"""The tables of an SAE's cache, gathered batch by batch over one shard of pairs.

Rows are in the order of the pairs, chosen before rejected, tokens by position, whatever the order
in which the batches came.

Shapes: N scored tokens, M active features of them, R responses, F = d_sae.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_core.data.batches import PairIds
from fpo_core.features.stats import SIDES, FeatureStats, place_of
from fpo_core.lists import Lists, concatenated, from_rows, offsets_of
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import ActiveFeatures

Columns = dict[str, Any]


class ScoredTokens(NamedTuple):
    """A batch's scored tokens, response by response."""

    responses: np.ndarray  # [R] the shard's number of each: 2i chosen, 2i + 1 rejected of pair i
    lengths: np.ndarray  # [R] scored tokens of each
    positions: np.ndarray  # [N] index of each within its response, unscored tokens included
    targets: np.ndarray  # [N] the token predicted at each


class FeatureColumns(NamedTuple):
    """The columns of a shard's three tables."""

    pooled: Columns
    tokens: Columns
    stats: Columns


class _TokenRows(NamedTuple):
    """Rows of the token table, in the order in which they came."""

    numbers: dict[str, np.ndarray]  # response, position, token_id, nonzero, mass
    indices: Lists
    values: Lists

    def take(self, rows: np.ndarray) -> "_TokenRows":
        numbers = {name: column[rows] for name, column in self.numbers.items()}
        return _TokenRows(numbers, self.indices.take(rows), self.values.take(rows))


class _PooledRow(NamedTuple):
    """A response's row of the pooled table."""

    n_tokens: int
    indices: np.ndarray
    values: np.ndarray
    nonzero: int
    mass: float
    cutoff: float
    pinned_values: np.ndarray


class FeatureTables:
    """Gathers the pooled features, token features and statistics of a shard.

    Args:
        pairs: the shard's pairs.
        d_sae: F.
        settings: what to keep.
        pinned: features whose pooled values are kept whatever they are, ascending.
    """

    def __init__(
        self, pairs: Sequence[PairIds], d_sae: int, settings: FeatureSettings,
        pinned: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.pairs, self.d_sae, self.settings = pairs, d_sae, settings
        self.pinned = np.array(pinned, dtype=np.uint32)
        self.cache_k = d_sae if settings.cache_k == "all" else min(settings.cache_k, d_sae)
        self.stats = FeatureStats(d_sae, settings.examples)
        self._pooled: list[_PooledRow | None] = [None] * (2 * len(pairs))
        self._tokens: list[_TokenRows] = []

    def add(self, tokens: ScoredTokens, active: ActiveFeatures) -> None:
        """Take in a batch: every response of some of the pairs, whole."""
        response = np.repeat(tokens.responses, tokens.lengths)
        count = np.bincount(active.token, minlength=len(response))
        kept = self._add_tokens(tokens, response, active, count)
        place = place_of(response, tokens.positions)[active.token]
        self.stats.add_tokens(len(response), active, place, kept)
        ends = np.cumsum(count)[np.cumsum(tokens.lengths) - 1]
        for row, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            self._add_response(
                int(tokens.responses[row]), int(tokens.lengths[row]),
                active.feature[begin:end], active.value[begin:end],
            )  # fmt: skip

    def _add_tokens(
        self, tokens: ScoredTokens, response: np.ndarray, active: ActiveFeatures, count: np.ndarray
    ) -> np.ndarray:
        """Keep each token's strongest features; returns which of the active ones these are."""
        order = _strongest_first(active)
        kept = order[_counting(count) < self.settings.tokens_k]
        offsets = offsets_of(np.minimum(count, self.settings.tokens_k))
        indices = Lists(active.feature[kept].astype(np.uint32), offsets)
        values = Lists(active.value[kept], offsets)
        mass = np.bincount(active.token, weights=active.value, minlength=len(count))
        numbers = {
            "response": response, "position": tokens.positions, "token_id": tokens.targets,
            "nonzero": count, "mass": mass.astype(np.float32),
        }  # fmt: skip
        every = _TokenRows(numbers, indices, values)
        rows = self._sampled(tokens)
        self._tokens.append(every if rows is None else every.take(rows))
        return kept

    def _sampled(self, tokens: ScoredTokens) -> np.ndarray | None:
        """Which tokens have a row, None: all. A matter of pair, side and position alone."""
        share = self.settings.tokens_share
        if share >= 1:
            return None
        names = ((self.pairs[n // 2].pair_id, SIDES[n % 2]) for n in tokens.responses.tolist())
        seeds = [
            int.from_bytes(hashlib.sha256("/".join(name).encode()).digest()[:8]) for name in names
        ]
        seed = np.repeat(np.array(seeds, dtype=np.uint64), tokens.lengths)
        position = tokens.positions.astype(np.uint64)
        return np.flatnonzero(_mixed(seed + position) < share * 2.0**64)

    def _add_response(
        self, response: int, length: int, feature: np.ndarray, value: np.ndarray
    ) -> None:
        sums = np.bincount(feature, weights=value, minlength=self.d_sae)
        positive = np.flatnonzero(sums)
        exact = sums[positive] / length
        means = exact.astype(np.float32)
        order = np.argsort(-means, kind="stable")  # ties go to the lower index
        stored, left = order[: self.cache_k], order[self.cache_k :]
        self.stats.add_response(response % 2, positive, exact, stored)
        self._pooled[response] = _PooledRow(
            length, positive[stored].astype(np.uint32), means[stored], len(positive),
            float(exact.sum()), float(means[left[0]]) if len(left) else 0.0,
            (sums[self.pinned] / length).astype(np.float32),
        )  # fmt: skip

    def columns(self) -> FeatureColumns:
        """The tables' columns, once every pair has been added; lists as ``Lists``."""
        return FeatureColumns(self._pooled_columns(), self._token_columns(), self.stats.columns())

    def _pooled_columns(self) -> Columns:
        rows = [row for row in self._pooled if row is not None]
        assert len(rows) == len(self._pooled), "a pair was not added"
        pair_ids, sides = self._names(np.arange(len(rows)))
        pinned = offsets_of(np.full(len(rows), len(self.pinned)))
        return {
            "pair_id": pair_ids,
            "side": sides,
            "n_tokens": np.array([row.n_tokens for row in rows], dtype=np.int32),
            "indices": from_rows([row.indices for row in rows], np.uint32),
            "values": from_rows([row.values for row in rows], np.float32),
            "nonzero": np.array([row.nonzero for row in rows], dtype=np.int32),
            "mass": np.array([row.mass for row in rows], dtype=np.float32),
            "cutoff": np.array([row.cutoff for row in rows], dtype=np.float32),
            "pinned": Lists(np.tile(self.pinned, len(rows)), pinned),
            "pinned_values": from_rows([row.pinned_values for row in rows], np.float32),
        }

    def _token_columns(self) -> Columns:
        parts = self._tokens
        every = {
            name: np.concatenate([rows.numbers[name] for rows in parts])
            for name in parts[0].numbers
        }  # fmt: skip
        order = np.argsort(every["response"], kind="stable")  # a response's tokens came in order
        pair_ids, sides = self._names(every["response"][order])
        return {
            "pair_id": pair_ids,
            "side": sides,
            **{name: every[name][order].astype(np.int32) for name in ("position", "token_id")},
            "indices": concatenated([rows.indices for rows in parts], np.uint32).take(order),
            "values": concatenated([rows.values for rows in parts], np.float32).take(order),
            "nonzero": every["nonzero"][order].astype(np.int32),
            "mass": every["mass"][order],
        }

    def _names(self, responses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pair_ids = np.array([pair.pair_id for pair in self.pairs])
        return pair_ids[responses // 2], np.array(SIDES)[responses % 2]


def _strongest_first(active: ActiveFeatures) -> np.ndarray:
    """An order [M] of what is active: by token, its features by descending value.

    Stable, and a token's features ascend: ties go to the lower index. One key of both, as the bits
    of positive floats are in the order of their values: a tenth of ``lexsort``'s time.
    """
    weakness = np.int64(np.iinfo(np.int32).max) - active.value.view(np.int32)
    return np.argsort((active.token << 32) | weakness, kind="stable")


def _counting(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... anew in each of some runs."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)


def _mixed(seed: np.ndarray) -> np.ndarray:
    """Numbers [.] uint64 that look drawn at random (the finalizer of splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        seed = (seed ^ (seed >> np.uint64(shift))) * np.uint64(factor)
    return seed ^ (seed >> np.uint64(31))
