"""A shard of the ``pairs`` table as arrays: token ids, and the ranges that are not scored.

Every stage that reads token ids reads them here. A table from before the columns of unscored ranges
has none: all of its response tokens are scored.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fpo_core.data.batches import PairIds
from fpo_core.lists import Lists, lists_of

SIDES = ("chosen", "rejected")


class PairShard(NamedTuple):
    """Columns of a shard's pairs, every split's."""

    pair_id: list[str]
    prompt: Lists
    chosen: Lists
    rejected: Lists
    unscored: tuple[Lists, Lists]  # ranges of chosen and of rejected, as in ``PairIds``

    @property
    def scored(self) -> tuple[np.ndarray, np.ndarray]:
        """Scored tokens [P] of the chosen and of the rejected responses."""
        chosen, rejected = self.unscored
        return _num_scored(self.chosen, chosen), _num_scored(self.rejected, rejected)

    def pair(self, row: int) -> PairIds:
        """Return one pair; its arrays are views."""
        chosen, rejected = self.unscored
        return PairIds(
            pair_id=self.pair_id[row],
            prompt=self.prompt[row],
            chosen=self.chosen[row],
            rejected=self.rejected[row],
            unscored=(chosen[row], rejected[row]),
        )


def read_pair_shard(table: pa.Table) -> PairShard:
    """Return the columns of a shard of ``pairs``."""
    chosen, rejected = (_unscored(table, f"{side}_unscored") for side in SIDES)
    return PairShard(
        pair_id=table["pair_id"].to_pylist(),
        prompt=lists_of(table, "prompt_ids"),
        chosen=lists_of(table, "chosen_ids"),
        rejected=lists_of(table, "rejected_ids"),
        unscored=(chosen, rejected),
    )


def _unscored(table: pa.Table, name: str) -> Lists:
    """Return a column of ranges; empty ones where the table is from before it."""
    if name in table.column_names:
        return lists_of(table, name)
    return Lists(np.empty(0, dtype=np.int32), np.zeros(table.num_rows + 1, dtype=np.int64))


def _num_scored(responses: Lists, unscored: Lists) -> np.ndarray:
    """Return the scored tokens [P] of responses, from their ranges."""
    spans = unscored.values[1::2].astype(np.int64) - unscored.values[0::2]
    rows = np.repeat(np.arange(len(responses)), unscored.lengths // 2)
    left_out = np.bincount(rows, weights=spans, minlength=len(responses))
    return responses.lengths - left_out.astype(np.int64)
