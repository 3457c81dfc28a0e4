"""Training examples from aligned shards: a shard at a time, column by column, checked as read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from fpo_core.data.batches import PairIds
from fpo_core.data.pair_shard import SIDES, PairShard, read_pair_shard
from fpo_core.errors import FPOError
from fpo_core.training.feature_shards import CachedSide, FeatureShards, read_features
from fpo_core.training.shards import check_pairs


class Example(NamedTuple):
    """A pair with everything the reference side contributes."""

    ids: PairIds
    logps: tuple[float, float]  # reference, summed: chosen, rejected; zeros without a cache
    features: tuple[tuple[CachedSide, CachedSide], ...]  # an SAE: chosen, rejected


class AlignedShards:
    """Pairs and their caches: shard i of each holds the same pairs in the same order.

    Args:
        pairs: shards of token ids.
        reference: shards of the reference's log-probs; none where there is nothing to compare with.
        features: every SAE's shards.
        k: the discrepancy's top-k, which a cache has to hold.
        split: ``train`` or ``heldout``.

    Raises:
        FPOError: another number of shards.
    """

    def __init__(
        self, pairs: Sequence[Path], reference: Sequence[Path], features: Sequence[FeatureShards],
        k: int, split: str,
    ) -> None:  # fmt: skip
        self.pairs, self.reference, self.features = pairs, reference, features
        self.k, self.split = k, split
        for label, shards in (("reference", reference), *((c.label, c.pooled) for c in features)):
            if (shards or label != "reference") and len(shards) != len(pairs):
                raise FPOError(f"{len(pairs)} shards of pairs, {len(shards)} of {label}")

    def __len__(self) -> int:
        """Shards."""
        return len(self.pairs)

    def counts(self) -> list[int]:
        """Rows of the split in each shard; reads one small column."""
        return [
            sum(split == self.split for split in pq.read_table(path, columns=["split"])["split"]
                .to_pylist())
            for path in self.pairs
        ]  # fmt: skip

    def read(self, shard: int) -> list[Example]:
        """The split's examples of a shard, in its order.

        Raises:
            FPOError: caches of other pairs or other scored tokens, or features that do not serve
                this SAE, k or groups; naming the row and both values.
        """
        table = pq.read_table(self.pairs[shard])
        pairs = read_pair_shard(table)
        logps = self._logps(shard, pairs)
        cached = [read_features(cache, shard, pairs, self.k) for cache in self.features]
        return [
            Example(
                pairs.pair(row),
                logps[row],
                tuple((rows[2 * row], rows[2 * row + 1]) for rows in cached),
            )
            for row, split in enumerate(table["split"].to_pylist())
            if split == self.split
        ]

    def first(self, count: int) -> list[Example]:
        """The split's first examples; no more shards are read than they are in."""
        found: list[Example] = []
        for shard, rows in enumerate(self.counts()):
            if rows and len(found) < count:
                found += self.read(shard)
        return found[:count]

    def _logps(self, shard: int, pairs: PairShard) -> list[tuple[float, float]]:
        if not self.reference:
            return [(0.0, 0.0)] * len(pairs.pair_id)
        table = pq.read_table(self.reference[shard])
        if table.num_rows != len(pairs.pair_id):
            raise FPOError(
                f"shard {shard}: {len(pairs.pair_id)} pairs, {table.num_rows} reference rows; "
                f"recompute with `fpo run RECIPE --from reference --force`"
            )
        counts = [table[f"{side}_tokens"].to_numpy() for side in SIDES]
        check_pairs("reference", shard, pairs, table["pair_id"].to_pylist(), counts)
        sides = (table[f"{side}_logp"].to_pylist() for side in SIDES)
        return list(zip(*sides, strict=True))


def read_examples(
    pairs: Sequence[Path], reference: Sequence[Path], features: Sequence[FeatureShards], k: int,
    split: str,
) -> list[Example]:  # fmt: skip
    """All examples of a split; arguments and errors as of ``AlignedShards``."""
    shards = AlignedShards(pairs, reference, features, k, split)
    return [example for number in range(len(shards)) for example in shards.read(number)]
