"""Per-feature statistics, gathered in the pass that makes the features.

``FeatureStats`` adds up one shard's responses; ``StatsMerge`` adds up shards. Both hold a few
numbers a feature, however much goes in, so the memory of a pass does not follow its data, and an
interrupted one keeps what it has.

Shapes: N scored tokens, M active features of them, F = d_sae, E = examples kept a feature.
"""

from typing import Any

import numpy as np

from fpo_core.lists import Lists, offsets_of
from fpo_core.sae.coder import ActiveFeatures

SIDES = ("chosen", "rejected")
# What is added up, feature by feature: of tokens, then of responses.
COUNTS = ("active", "kept", "pooled_active", "pooled_kept")
SUMS = ("total", "kept_total", "pooled_kept_total", "total_chosen", "total_rejected")


class TopExamples:
    """The strongest activations of every feature, each with a number that says where it was.

    Args:
        d_sae: F.
        keep: E.
    """

    def __init__(self, d_sae: int, keep: int) -> None:
        self.values = np.zeros((d_sae, keep), dtype=np.float32)  # descending; 0: none
        self.places = np.zeros((d_sae, keep), dtype=np.int64)

    def offer(self, feature: np.ndarray, value: np.ndarray, place: np.ndarray) -> None:
        """Keep the strongest of what is there and of these; among equals, the lower place.

        Args:
            feature: [M] whose activation.
            value: [M] the activation, positive.
            place: [M] where it was.
        """
        keep = self.values.shape[1]
        if not keep:
            return
        stronger = np.flatnonzero(value >= self.values[feature, -1])
        if not len(stronger):
            return
        order = stronger[np.lexsort((place[stronger], -value[stronger], feature[stronger]))]
        touched, first, count = np.unique(feature[order], return_index=True, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(first, count)
        row = np.repeat(np.arange(len(touched)), count)
        best, rows, ranks = order[rank < keep], row[rank < keep], rank[rank < keep]
        values = np.zeros((len(touched), 2 * keep), dtype=np.float32)
        places = np.zeros((len(touched), 2 * keep), dtype=np.int64)
        values[:, :keep], places[:, :keep] = self.values[touched], self.places[touched]
        values[rows, keep + ranks], places[rows, keep + ranks] = value[best], place[best]
        strongest = np.lexsort((places, -values), axis=1)[:, :keep]
        self.values[touched] = np.take_along_axis(values, strongest, 1)
        self.places[touched] = np.take_along_axis(places, strongest, 1)

    def lists(self) -> tuple[Lists, Lists]:
        """Values and places as a list a feature."""
        there = self.values > 0
        offsets = offsets_of(there.sum(1))
        return Lists(self.values[there], offsets), Lists(self.places[there], offsets)


class FeatureStats:
    """Sums over a shard's tokens and responses, and its strongest examples, of every feature.

    Args:
        d_sae: F.
        examples: E.
    """

    def __init__(self, d_sae: int, examples: int) -> None:
        self.d_sae = d_sae
        self.tokens = 0
        self.responses = np.zeros(2, dtype=np.int64)  # chosen, rejected
        self.counts = {name: np.zeros(d_sae, dtype=np.int64) for name in COUNTS}
        self.sums = {name: np.zeros(d_sae) for name in SUMS}
        self.peak = np.zeros(d_sae, dtype=np.float32)
        self.examples = TopExamples(d_sae, examples)

    def add_tokens(
        self, tokens: int, active: ActiveFeatures, place: np.ndarray, kept: np.ndarray
    ) -> None:
        """Count some tokens.

        Args:
            tokens: how many.
            active: their active features.
            place: [M] the place of each one's token: its response's number, and its position.
            kept: the entries of ``active`` that the token table stores.
        """
        feature, value = active.feature, active.value
        self.tokens += tokens
        self._add("active", "total", feature, value)
        self._add("kept", "kept_total", feature[kept], value[kept])
        np.maximum.at(self.peak, feature, value)
        self.examples.offer(feature, value, place)

    def _add(self, count: str, total: str, feature: np.ndarray, value: np.ndarray) -> None:
        self.counts[count] += np.bincount(feature, minlength=self.d_sae)
        self.sums[total] += np.bincount(feature, weights=value, minlength=self.d_sae)

    def add_response(
        self, side: int, feature: np.ndarray, mean: np.ndarray, stored: np.ndarray
    ) -> None:
        """Count a response's pooled features.

        Args:
            side: 0 chosen, 1 rejected.
            feature: those that are positive, ascending.
            mean: their values.
            stored: which of them the pooled table stores, as places in ``feature``.
        """
        self.responses[side] += 1
        self.sums[f"total_{SIDES[side]}"][feature] += mean
        self.counts["pooled_active"][feature] += 1
        self.counts["pooled_kept"][feature[stored]] += 1
        self.sums["pooled_kept_total"][feature[stored]] += mean[stored]

    def columns(self) -> dict[str, Any]:
        """As columns of ``features/shard_stats``, one row a feature."""
        values, places = self.examples.lists()
        response, position = response_and_position(places.values)
        every = np.ones(self.d_sae, dtype=np.int64)
        return {
            "feature": np.arange(self.d_sae, dtype=np.uint32),
            "tokens": every * self.tokens,
            **{
                f"responses_{name}": every * n
                for name, n in zip(SIDES, self.responses, strict=True)
            },
            **self.counts,
            **self.sums,
            "max": self.peak,
            "example_responses": Lists(response.astype(np.uint32), places.offsets),
            "example_positions": Lists(position.astype(np.int32), places.offsets),
            "example_values": values,
        }


class StatsMerge:
    """The statistics of all shards together, shard by shard.

    Args:
        d_sae: F.
        examples: E.
    """

    def __init__(self, d_sae: int, examples: int) -> None:
        self.tokens = 0
        self.responses = np.zeros(2, dtype=np.int64)
        self.sums = {name: np.zeros(d_sae) for name in (*COUNTS, *SUMS)}
        self.peak = np.zeros(d_sae, dtype=np.float32)
        self.examples = TopExamples(d_sae, examples)
        # The pairs that the examples are of: their numbers in all shards, and their ids.
        self._pairs = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.str_)
        self._count = 0

    def add(self, columns: dict[str, Any], pair_ids: np.ndarray) -> None:
        """Add a shard.

        Args:
            columns: of its ``features/shard_stats``; arrays and ``Lists``.
            pair_ids: its pairs, in order.
        """
        self.tokens += int(columns["tokens"][0])
        self.responses += [int(columns[f"responses_{side}"][0]) for side in SIDES]
        for name, total in self.sums.items():
            total += columns[name]
        np.maximum(self.peak, columns["max"], out=self.peak)
        values = columns["example_values"]
        self.examples.offer(
            np.repeat(np.arange(len(self.peak)), values.lengths),
            values.values,
            place_of(
                2 * self._count + columns["example_responses"].values.astype(np.int64),
                columns["example_positions"].values,
            ),
        )
        self._remember(pair_ids)

    def _remember(self, pair_ids: np.ndarray) -> None:
        """Keep the ids of the pairs that examples are of, and no others."""
        numbers, names = self._pairs
        numbers = np.concatenate([numbers, self._count + np.arange(len(pair_ids))])
        names = np.concatenate([names, np.asarray(pair_ids, dtype=np.str_)])
        self._count += len(pair_ids)
        kept = np.isin(numbers, self._example_pairs())
        self._pairs = numbers[kept], names[kept]

    def _example_pairs(self) -> np.ndarray:
        places = self.examples.places[self.examples.values > 0]
        return np.unique(response_and_position(places)[0] // 2)

    def columns(self) -> dict[str, Any]:
        """As columns of ``features/stats``; ``examples`` as its own columns of lists."""
        sums, means = self.sums, {}
        for side, count in zip(SIDES, self.responses, strict=True):
            means[f"mean_{side}"] = (sums[f"total_{side}"] / count).astype(np.float32)
        values, places = self.examples.lists()
        response, position = response_and_position(places.values)
        numbers, names = self._pairs
        return {
            "feature": np.arange(len(self.peak), dtype=np.uint32),
            "density": (sums["active"] / self.tokens).astype(np.float32),
            "mean": (sums["total"] / self.tokens).astype(np.float32),
            "max": self.peak,
            **means,
            "examples": {
                "pair_id": names[np.searchsorted(numbers, response // 2)],
                "side": np.array(SIDES)[response % 2],
                "position": position.astype(np.int32),
                "value": values.values,
                "offsets": values.offsets,
            },
        }

    def dropped(self) -> dict[str, float]:
        """What the top-k of tokens and of responses leaves out.

        Shares of the activations' sum, and active features a token or response.
        """
        sums, responses = self.sums, self.responses.sum()
        pooled = sums["total_chosen"].sum() + sums["total_rejected"].sum()
        return {
            "tokens_mass": _share_left(sums["kept_total"].sum(), sums["total"].sum()),
            "tokens_features": float((sums["active"] - sums["kept"]).sum() / self.tokens),
            "pooled_mass": _share_left(sums["pooled_kept_total"].sum(), pooled),
            "pooled_features": float(
                (sums["pooled_active"] - sums["pooled_kept"]).sum() / responses
            ),
        }


def place_of(response: np.ndarray, position: np.ndarray) -> np.ndarray:
    """One number of a response's number and a position in it."""
    return (response.astype(np.int64) << 32) | position


def response_and_position(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two numbers that ``place_of`` made one."""
    return place >> 32, place & 0xFFFFFFFF


def _share_left(kept: float, every: float) -> float:
    return float(1 - kept / every) if every else 0.0
