"""Training examples from aligned shards: a shard at a time, column by column, checked as read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fpo_core.data.batches import PairIds
from fpo_core.errors import FPOError

SIDES = ("chosen", "rejected")
RECOMPUTE = "recompute it with `fpo run RECIPE --from features --force`"
RECOMPUTE_CACHES = "recompute the caches with `fpo run RECIPE --from reference --force`"


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


class Example(NamedTuple):
    """A pair with everything the reference side contributes."""

    ids: PairIds
    logps: tuple[float, float]  # reference, summed: chosen, rejected; zeros without a cache
    features: tuple[tuple[CachedSide, CachedSide], ...]  # an SAE: chosen, rejected


class FeatureShards(NamedTuple):
    """One SAE's cache: files aligned with the pairs', and what it has to be."""

    pooled: tuple[Path, ...]
    tokens: tuple[Path, ...]  # empty unless the unpooled discrepancy is trained on
    d_sae: int
    pinned: tuple[int, ...]  # features whose values have to be there
    label: str  # for messages, e.g. "features (layer 20 resid_post)"


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
        pairs = _Pairs(
            table["pair_id"].to_pylist(),
            *(_lists(table, f"{part}_ids") for part in ("prompt", *SIDES)),
        )
        logps = self._logps(shard, pairs)
        cached = [_read_features(cache, shard, pairs, self.k) for cache in self.features]
        return [
            Example(
                PairIds(pair_id, *(part[row] for part in pairs[1:])),
                logps[row],
                tuple((rows[2 * row], rows[2 * row + 1]) for rows in cached),
            )
            for row, (pair_id, split) in enumerate(
                zip(pairs.pair_id, table["split"].to_pylist(), strict=True)
            )
            if split == self.split
        ]

    def first(self) -> Example:
        """The first example of the split."""
        return next(example for shard in range(len(self)) for example in self.read(shard))

    def _logps(self, shard: int, pairs: "_Pairs") -> list[tuple[float, float]]:
        if not self.reference:
            return [(0.0, 0.0)] * len(pairs.pair_id)
        table = pq.read_table(self.reference[shard])
        if table.num_rows != len(pairs.pair_id):
            raise FPOError(
                f"shard {shard}: {len(pairs.pair_id)} pairs, {table.num_rows} reference rows; "
                f"recompute with `fpo run RECIPE --from reference --force`"
            )
        counts = [table[f"{side}_tokens"].to_numpy() for side in SIDES]
        _check_pairs("reference", shard, pairs, table["pair_id"].to_pylist(), counts)
        sides = (table[f"{side}_logp"].to_pylist() for side in SIDES)
        return list(zip(*sides, strict=True))


def read_examples(
    pairs: Sequence[Path], reference: Sequence[Path], features: Sequence[FeatureShards], k: int,
    split: str,
) -> list[Example]:  # fmt: skip
    """All examples of a split; arguments and errors as of ``AlignedShards``."""
    shards = AlignedShards(pairs, reference, features, k, split)
    return [example for number in range(len(shards)) for example in shards.read(number)]


class _Lists(NamedTuple):
    """A column of lists: row i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


class _Pairs(NamedTuple):
    """A shard's pairs, every split's."""

    pair_id: list[str]
    prompt: _Lists
    chosen: _Lists
    rejected: _Lists


def _lists(table: pa.Table, name: str) -> _Lists:
    column: Any = table[name].combine_chunks()
    offsets = column.offsets.to_numpy()
    return _Lists(column.flatten().to_numpy(), offsets - offsets[0])


def _first(wrong: np.ndarray) -> int | None:
    """The first row where something is wrong."""
    rows = np.flatnonzero(wrong)
    return int(rows[0]) if len(rows) else None


def _check_pairs(
    label: str, shard: int, pairs: _Pairs, pair_ids: list[str], counts: Sequence[np.ndarray]
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
        row = _first(made_of != scored)
        if row is not None:
            raise FPOError(
                f"shard {shard}, row {row}: the {side} response of pair {pairs.pair_id[row]} has "
                f"{scored[row]} scored tokens, {label} was made of {made_of[row]}; "
                f"{RECOMPUTE_CACHES}"
            )


def _read_features(cache: FeatureShards, shard: int, pairs: _Pairs, k: int) -> list[CachedSide]:
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
        _check_pairs(cache.label, shard, pairs, pair_ids[side::2], counts)
    sides = table["side"].to_pylist()
    for row, (found, wanted) in enumerate(zip(sides, SIDES * count, strict=True)):
        if found != wanted:
            raise FPOError(
                f"shard {shard}, row {row // 2}: {cache.label} has the {found} response of pair "
                f"{pair_ids[row]} where the {wanted} one should be; {RECOMPUTE}"
            )
    indices, values = _lists(table, "indices"), _lists(table, "values")
    _check_serves(cache, shard, indices, table["nonzero"].to_numpy(), k)
    cutoff = table["cutoff"].to_pylist()
    pinned = _pinned_values(cache, shard, table)
    responses = _Responses(pair_ids, sides, lengths)
    tokens: Sequence[TokenFeatures | None] = (
        _read_tokens(cache, shard, responses, k) if cache.tokens else [None] * len(sides)
    )
    return [
        CachedSide(PooledFeatures(indices[row], values[row], cutoff[row], pinned[row]), tokens[row])
        for row in range(2 * count)
    ]


def _check_serves(
    cache: FeatureShards, shard: int, indices: _Lists, nonzero: np.ndarray, k: int
) -> None:
    """Refuse rows of another SAE, or of too small a top-k."""
    if indices.values.max(initial=0) >= cache.d_sae:
        place = int(np.argmax(indices.values))
        row = int(np.searchsorted(indices.offsets, place, side="right")) - 1
        raise FPOError(
            f"shard {shard}, row {row // 2}: {cache.label} names feature {indices.values[place]}, "
            f"the SAE has 0 to {cache.d_sae - 1}: the cache is of another SAE; {RECOMPUTE}"
        )
    row = _first(indices.lengths < np.minimum(k, nonzero))
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
    features, values = _lists(table, "pinned"), _lists(table, "pinned_values")
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
    lengths: np.ndarray


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
    lists, nonzero = _lists(table, "indices"), table["nonzero"].to_numpy()
    stored = lists.lengths
    _check_tokens(cache, shard, table, responses)
    short = _first(stored < np.minimum(k, nonzero))
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
    values[filled] = _lists(table, "values").values
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
    begins = np.repeat(np.cumsum(lengths) - lengths, lengths)
    wanted = {
        "pair_id": np.array(responses.pair_id)[owner],
        "side": np.array(responses.side)[owner],
        "position": np.arange(len(owner)) - begins,
    }
    for name, values in wanted.items():
        found = np.array(table[name].to_pylist())
        row = _first(found != values)
        if row is not None:
            raise FPOError(
                f"shard {shard}, token row {row}: the token features of {cache.label} have the "
                f"{name} {found[row]} where {values[row]} should be; {RECOMPUTE}"
            )
    highest = int(_lists(table, "indices").values.max(initial=0))
    if highest >= cache.d_sae:
        raise FPOError(
            f"shard {shard}: the token features of {cache.label} name feature {highest}, the SAE "
            f"has 0 to {cache.d_sae - 1}: the cache is of another SAE; {RECOMPUTE}"
        )


def check_vocabulary(examples: Sequence[Example], size: int) -> None:
    """Refuse pairs of another tokenizer, as far as token ids show it.

    Raises:
        FPOError: naming a pair whose ids the model does not have.
    """
    for example in examples:
        highest = max(int(np.max(ids, initial=0)) for ids in example.ids[1:])
        if highest >= size:
            raise FPOError(
                f"pair {example.ids.pair_id} has the token id {highest}, the model's vocabulary "
                f"has {size}: `pairs` was made with another tokenizer; rerun from tokenize"
            )
