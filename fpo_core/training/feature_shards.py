"""An SAE's cache, shard by shard: read whole, and checked against the pairs, the SAE and k."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fpo_core.data.batches import scored_tokens
from fpo_core.data.pair_shard import SIDES, PairShard
from fpo_core.errors import FPOError
from fpo_core.lists import Lists, lists_of
from fpo_core.training.shards import check_pairs, first_wrong

RECOMPUTE = "recompute it with `fpo run RECIPE --from features --force`"


class PooledFeatures(NamedTuple):
    """The cached pooled features of one response."""

    indices: np.ndarray  # [cache_k] or fewer, by descending value
    values: np.ndarray
    cutoff: float  # largest value that is not stored; 0 when all are
    pinned: np.ndarray  # [P] values of the pinned features


class TokenFeatures(NamedTuple):
    """The cached features of one response's tokens."""

    indices: np.ndarray  # [n, tokens_k] int32, by descending value; -1 where a token has fewer
    values: np.ndarray  # [n, tokens_k] float32
    cutoff: np.ndarray  # [n] a bound on what is not stored; 0 when all are


class CachedSide(NamedTuple):
    """What an SAE's cache holds of one response."""

    pooled: PooledFeatures
    tokens: TokenFeatures | None  # read for the unpooled discrepancy only


class FeatureShards(NamedTuple):
    """One SAE's cache: files aligned with the pairs', and what it has to be."""

    pooled: tuple[Path, ...]
    tokens: tuple[Path, ...]  # empty unless the unpooled discrepancy is trained on
    d_sae: int
    pinned: tuple[int, ...]  # features whose values have to be there
    label: str  # for messages, e.g. "features (layer 20 resid_post)"


def read_features(cache: FeatureShards, shard: int, pairs: PairShard, k: int) -> list[CachedSide]:
    """The rows of a shard, two a pair, checked against the pairs and the SAE."""
    table = pq.read_table(cache.pooled[shard])
    count = len(pairs.pair_id)
    if table.num_rows != 2 * count:
        raise FPOError(
            f"shard {shard}: {count} pairs, {table.num_rows} rows of {cache.label}, which has two "
            f"a pair; {RECOMPUTE}"
        )
    pair_ids, lengths = table["pair_id"].to_pylist(), table["n_tokens"].to_numpy()
    for side in (0, 1):
        counts = (lengths[0::2], lengths[1::2])
        check_pairs(cache.label, shard, pairs, pair_ids[side::2], counts)
    sides = table["side"].to_pylist()
    for row, (found, wanted) in enumerate(zip(sides, SIDES * count, strict=True)):
        if found != wanted:
            raise FPOError(
                f"shard {shard}, row {row // 2}: {cache.label} has the {found} response of pair "
                f"{pair_ids[row]} where the {wanted} one should be; {RECOMPUTE}"
            )
    indices, values = lists_of(table, "indices"), lists_of(table, "values")
    _check_serves(cache, shard, indices, table["nonzero"].to_numpy(), k)
    cutoff = table["cutoff"].to_pylist()
    pinned = _pinned_values(cache, shard, table)
    responses = _Responses(pair_id=pair_ids, side=sides, lengths=lengths, pairs=pairs)
    tokens: Sequence[TokenFeatures | None] = (
        _read_tokens(cache, shard, responses, k) if cache.tokens else [None] * len(sides)
    )
    return [
        CachedSide(PooledFeatures(indices[row], values[row], cutoff[row], pinned[row]), tokens[row])
        for row in range(2 * count)
    ]


def _check_serves(
    cache: FeatureShards, shard: int, indices: Lists, nonzero: np.ndarray, k: int
) -> None:
    """Refuse rows of another SAE, or of too small a top-k."""
    if indices.values.max(initial=0) >= cache.d_sae:
        place = int(np.argmax(indices.values))
        row = int(np.searchsorted(indices.offsets, place, side="right")) - 1
        raise FPOError(
            f"shard {shard}, row {row // 2}: {cache.label} names feature {indices.values[place]}, "
            f"the SAE has 0 to {cache.d_sae - 1}: the cache is of another SAE; {RECOMPUTE}"
        )
    row = first_wrong(indices.lengths < np.minimum(k, nonzero))
    if row is not None:
        raise FPOError(
            f"shard {shard}, row {row // 2}: train.k={k}, {cache.label} stores "
            f"{indices.lengths[row]} of {nonzero[row]} features; raise features.cache_k, or lower "
            f"train.k"
        )


def _pinned_values(cache: FeatureShards, shard: int, table: pa.Table) -> np.ndarray:
    """Values [rows, P] of the features that the groups hold.

    Raises:
        FPOError: the cache has none of one of them.
    """
    found = np.zeros((table.num_rows, len(cache.pinned)), dtype=np.float32)
    if not cache.pinned:
        return found
    features, values = lists_of(table, "pinned"), lists_of(table, "pinned_values")
    for row in range(table.num_rows):
        stored = features[row]  # ascending
        absent = sorted(set(cache.pinned) - set(stored.tolist()))
        if absent:
            raise FPOError(
                f"shard {shard}, row {row // 2}: train.groups hold feature "
                f"{', '.join(map(str, absent))}, {cache.label} has no values of it pinned; "
                f"{RECOMPUTE}"
            )
        found[row] = values[row][np.searchsorted(stored, cache.pinned)]
    return found


class _Responses(NamedTuple):
    """A shard's responses, two a pair."""

    pair_id: list[str]
    side: list[str]
    lengths: np.ndarray  # scored tokens
    pairs: PairShard

    def positions(self) -> np.ndarray:
        """Return the position of every scored token, response by response."""
        responses = zip(self.pairs.chosen, self.pairs.rejected, strict=True)
        unscored = zip(*self.pairs.unscored, strict=True)
        return np.concatenate(
            [
                scored_tokens(ids, ranges)
                for pair in zip(responses, unscored, strict=True)
                for ids, ranges in zip(*pair, strict=True)
            ]
        )


def _read_tokens(
    cache: FeatureShards, shard: int, responses: _Responses, k: int
) -> list[TokenFeatures]:
    """The token features of a shard, response by response: its rows are in that order."""
    table = pq.read_table(cache.tokens[shard])
    scored = int(responses.lengths.sum())
    if table.num_rows != scored:
        raise FPOError(
            f"shard {shard}: {scored} scored tokens, {table.num_rows} rows of the token "
            f"features of {cache.label}; {RECOMPUTE}"
        )
    lists, nonzero = lists_of(table, "indices"), table["nonzero"].to_numpy()
    stored = lists.lengths
    _check_tokens(cache, shard, table, responses)
    short = first_wrong(stored < np.minimum(k, nonzero))
    if short is not None:
        raise FPOError(
            f"shard {shard}, token row {short}: train.k={k}, the token features of {cache.label} "
            f"store {stored[short]} of {nonzero[short]}; raise features.tokens_k, or lower train.k"
        )
    width = max(1, int(stored.max(initial=0)))
    filled = np.arange(width) < stored[:, None]
    indices = np.full(filled.shape, -1, dtype=np.int32)
    values = np.zeros(filled.shape, dtype=np.float32)
    indices[filled] = lists.values
    values[filled] = lists_of(table, "values").values
    # What is left out of a token is at most the last value that is stored.
    last = values[np.arange(len(values)), np.maximum(stored - 1, 0)]
    cutoff = np.where(nonzero > stored, last, 0.0).astype(np.float32)
    ends = np.cumsum(responses.lengths)[:-1]
    parts = (np.split(column, ends) for column in (indices, values, cutoff))
    return [TokenFeatures(*columns) for columns in zip(*parts, strict=True)]


def _check_tokens(
    cache: FeatureShards, shard: int, table: pa.Table, responses: _Responses
) -> None:  # fmt: skip
    """Refuse token rows of other tokens than their place says, or of another SAE."""
    lengths = responses.lengths
    owner = np.repeat(np.arange(len(lengths)), lengths)
    wanted = {
        "pair_id": np.array(responses.pair_id)[owner],
        "side": np.array(responses.side)[owner],
        "position": responses.positions(),
    }
    for name, values in wanted.items():
        found = np.array(table[name].to_pylist())
        row = first_wrong(found != values)
        if row is not None:
            raise FPOError(
                f"shard {shard}, token row {row}: the token features of {cache.label} have the "
                f"{name} {found[row]} where {values[row]} should be; {RECOMPUTE}"
            )
    highest = int(lists_of(table, "indices").values.max(initial=0))
    if highest >= cache.d_sae:
        raise FPOError(
            f"shard {shard}: the token features of {cache.label} name feature {highest}, the SAE "
            f"has 0 to {cache.d_sae - 1}: the cache is of another SAE; {RECOMPUTE}"
        )
