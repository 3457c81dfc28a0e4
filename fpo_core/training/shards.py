"""Check that a cache's shard is of the pairs' shard."""

from collections.abc import Sequence

import numpy as np

from fpo_core.data.pair_shard import SIDES, PairShard
from fpo_core.errors import FPOError

RECOMPUTE_CACHES = "recompute the caches with `fpo run RECIPE --from reference --force`"


def first_wrong(wrong: np.ndarray) -> int | None:
    """The first row where something is wrong."""
    rows = np.flatnonzero(wrong)
    return int(rows[0]) if len(rows) else None


def check_pairs(
    label: str, shard: int, pairs: PairShard, pair_ids: list[str], counts: Sequence[np.ndarray]
) -> None:
    """Refuse a cache with a row of another pair, or of other scored tokens."""
    if pair_ids != pairs.pair_id:
        rows = enumerate(zip(pairs.pair_id, pair_ids, strict=True))
        row, (pair, other) = next((row, names) for row, names in rows if len(set(names)) > 1)
        raise FPOError(
            f"shard {shard}, row {row}: pairs and {label} disagree on the pair: {pair} and "
            f"{other}; {RECOMPUTE_CACHES}"
        )
    for side, made_of, scored in zip(SIDES, counts, pairs.scored, strict=True):
        row = first_wrong(made_of != scored)
        if row is not None:
            raise FPOError(
                f"shard {shard}, row {row}: the {side} response of pair {pairs.pair_id[row]} has "
                f"{scored[row]} scored tokens, {label} was made of {made_of[row]}; "
                f"{RECOMPUTE_CACHES}"
            )
