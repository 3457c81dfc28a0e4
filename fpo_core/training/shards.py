"""Columns of aligned shards: lists as arrays, and whether a cache is of the pairs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fpo_core.errors import FPOError

SIDES = ("chosen", "rejected")
RECOMPUTE_CACHES = "recompute the caches with `fpo run RECIPE --from reference --force`"


class Lists(NamedTuple):
    """A column of lists: row i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class ShardPairs(NamedTuple):
    """A shard's pairs, every split's."""

    pair_id: list[str]
    prompt: Lists
    chosen: Lists
    rejected: Lists


def lists_of(table: pa.Table, name: str) -> Lists:
    column: Any = table[name].combine_chunks()
    offsets = column.offsets.to_numpy()
    return Lists(column.flatten().to_numpy(), offsets - offsets[0])


def first_wrong(wrong: np.ndarray) -> int | None:
    """The first row where something is wrong."""
    rows = np.flatnonzero(wrong)
    return int(rows[0]) if len(rows) else None


def check_pairs(
    label: str, shard: int, pairs: ShardPairs, pair_ids: list[str], counts: Sequence[np.ndarray]
) -> None:
    """Refuse a cache with a row of another pair, or of other scored tokens."""
    if pair_ids != pairs.pair_id:
        rows = enumerate(zip(pairs.pair_id, pair_ids, strict=True))
        row, (pair, other) = next((row, names) for row, names in rows if len(set(names)) > 1)
        raise FPOError(
            f"shard {shard}, row {row}: pairs and {label} disagree on the pair: {pair} and "
            f"{other}; {RECOMPUTE_CACHES}"
        )
    for side, made_of, scored in zip(
        SIDES, counts, (pairs.chosen.lengths, pairs.rejected.lengths), strict=True
    ):
        row = first_wrong(made_of != scored)
        if row is not None:
            raise FPOError(
                f"shard {shard}, row {row}: the {side} response of pair {pairs.pair_id[row]} has "
                f"{scored[row]} scored tokens, {label} was made of {made_of[row]}; "
                f"{RECOMPUTE_CACHES}"
            )
