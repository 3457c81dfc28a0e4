"""Columns of aligned shards: lists as arrays, and whether a cache is of the pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fpo_core.errors import FPOError
from fpo_core.lists import Lists

SIDES = ("chosen", "rejected")
RECOMPUTE_CACHES = "recompute the caches with `fpo run RECIPE --from reference --force`"


class ShardPairs(NamedTuple):
    """A shard's pairs, every split's."""

    pair_id: list[str]
    prompt: Lists
    chosen: Lists
    rejected: Lists


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
