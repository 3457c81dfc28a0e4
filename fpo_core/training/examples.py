"""Training examples from aligned shards, and the order they are trained in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fpo_core.data.batches import PairIds
from fpo_core.errors import FPOError

SIDES = ("chosen", "rejected")
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


class Example(NamedTuple):
    """A pair with everything the reference side contributes."""

    ids: PairIds
    logps: tuple[float, float]  # reference, summed: chosen, rejected
    features: tuple[tuple[CachedSide, CachedSide], ...]  # an SAE: chosen, rejected


class FeatureShards(NamedTuple):
    """One SAE's cache: files aligned with the pairs', and what it has to be."""

    pooled: tuple[Path, ...]
    tokens: tuple[Path, ...]  # empty unless the unpooled discrepancy is trained on
    d_sae: int
    pinned: tuple[int, ...]  # features whose values have to be there
    label: str  # for messages, e.g. "features (layer 20 resid_post)"


def read_examples(
    pairs: Sequence[Path], reference: Sequence[Path], features: Sequence[FeatureShards], k: int,
    split: str,
) -> list[Example]:  # fmt: skip
    """Join the aligned shards of a split, row by row.

    Args:
        pairs: shards of token ids.
        reference: shards of the reference's log-probs.
        features: every SAE's shards.
        k: the discrepancy's top-k, which a cache has to hold.
        split: ``train`` or ``heldout``.

    Raises:
        FPOError: shards that do not hold the same pairs or the same scored tokens, or features that
            do not serve this SAE, k or groups; naming the row and both values.
    """
    for label, shards in (("reference", reference), *((c.label, c.pooled) for c in features)):
        if len(shards) != len(pairs):
            raise FPOError(f"{len(pairs)} shards of pairs, {len(shards)} of {label}")
    examples: list[Example] = []
    for shard, (ids_file, logps_file) in enumerate(zip(pairs, reference, strict=True)):
        ids, refs = (pq.read_table(path).to_pylist() for path in (ids_file, logps_file))
        if len(ids) != len(refs):
            raise FPOError(
                f"shard {shard}: {len(ids)} pairs, {len(refs)} reference rows; recompute with `fpo "
                f"run RECIPE --from reference --force`"
            )
        cached = [_read_features(cache, shard, ids, k) for cache in features]
        for row, (pair, ref) in enumerate(zip(ids, refs, strict=True)):
            where = f"shard {shard}, row {row}"
            _check_row("reference", where, pair, ref["pair_id"], _counts(ref))
            if pair["split"] == split:
                sides = tuple((rows[2 * row], rows[2 * row + 1]) for rows in cached)
                examples.append(_example(pair, ref, sides))
    return examples


def _example(pair: dict, ref: dict, sides: tuple[tuple[CachedSide, CachedSide], ...]) -> Example:
    ids = PairIds(pair["pair_id"], pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
    return Example(ids, (ref["chosen_logp"], ref["rejected_logp"]), sides)


def _counts(ref: dict) -> tuple[int, int]:
    return ref["chosen_tokens"], ref["rejected_tokens"]


def _check_row(
    label: str, where: str, pair: dict, pair_id: str, counts: tuple[int, int]
) -> None:  # fmt: skip
    """Refuse a cache's row that is of another pair, or of other scored tokens."""
    if pair_id != pair["pair_id"]:
        raise FPOError(
            f"{where}: pairs and {label} disagree on the pair: {pair['pair_id']} and {pair_id}; "
            f"recompute the caches with `fpo run RECIPE --from reference --force`"
        )
    for side, cached in zip(SIDES, counts, strict=True):
        scored = len(pair[f"{side}_ids"])
        if cached != scored:
            raise FPOError(
                f"{where}: the {side} response of pair {pair_id} has {scored} scored tokens, "
                f"{label} was made of {cached}; recompute the caches with `fpo run RECIPE --from "
                f"reference --force`"
            )


def _read_features(
    cache: FeatureShards, shard: int, pairs: Sequence[dict], k: int
) -> list[CachedSide]:  # fmt: skip
    """The rows of a shard, two a pair, each checked against its pair and the SAE."""
    rows = pq.read_table(cache.pooled[shard]).to_pylist()
    if len(rows) != 2 * len(pairs):
        raise FPOError(
            f"shard {shard}: {len(pairs)} pairs, {len(rows)} rows of {cache.label}, which has two "
            f"a pair; {RECOMPUTE}"
        )
    for number, pair in enumerate(pairs):
        where = f"shard {shard}, row {number}"
        chosen, rejected = rows[2 * number : 2 * number + 2]
        counts = (chosen["n_tokens"], rejected["n_tokens"])
        for row, side in zip((chosen, rejected), SIDES, strict=True):
            _check_row(cache.label, where, pair, row["pair_id"], counts)
            if row["side"] != side:
                raise FPOError(
                    f"{where}: {cache.label} has the {row['side']} response of pair "
                    f"{row['pair_id']} where the {side} one should be; {RECOMPUTE}"
                )
            _check_serves(row, cache, where, k)
    tokens = _read_tokens(cache, shard, rows, k) if cache.tokens else [None] * len(rows)
    return [
        CachedSide(_pooled(row, cache), found) for row, found in zip(rows, tokens, strict=True)
    ]  # fmt: skip


def _check_serves(row: dict, cache: FeatureShards, where: str, k: int) -> None:
    """Refuse a row of another SAE, of too small a top-k, or without the groups' values."""
    highest = max(row["indices"], default=-1)
    if highest >= cache.d_sae:
        raise FPOError(
            f"{where}: {cache.label} names feature {highest}, the SAE has 0 to {cache.d_sae - 1}: "
            f"the cache is of another SAE; {RECOMPUTE}"
        )
    if len(row["indices"]) < min(k, row["nonzero"]):
        raise FPOError(
            f"{where}: train.k={k}, {cache.label} stores {len(row['indices'])} of {row['nonzero']} "
            f"features; raise features.cache_k, or lower train.k"
        )
    absent = sorted(set(cache.pinned) - set(row["pinned"]))
    if absent:
        raise FPOError(
            f"{where}: train.groups hold feature {', '.join(map(str, absent))}, {cache.label} has "
            f"no values of it pinned; {RECOMPUTE}"
        )


def _pooled(row: dict, cache: FeatureShards) -> PooledFeatures:
    pinned = dict(zip(row["pinned"], row["pinned_values"], strict=True))
    return PooledFeatures(
        np.array(row["indices"], dtype=np.int64),
        np.array(row["values"], dtype=np.float32),
        row["cutoff"],
        np.array([pinned[feature] for feature in cache.pinned], dtype=np.float32),
    )


def _read_tokens(
    cache: FeatureShards, shard: int, responses: Sequence[dict], k: int
) -> list[TokenFeatures]:
    """The token features of a shard, response by response: its rows are in that order."""
    table = pq.read_table(cache.tokens[shard])
    lengths = [row["n_tokens"] for row in responses]
    if table.num_rows != sum(lengths):
        raise FPOError(
            f"shard {shard}: {sum(lengths)} scored tokens, {table.num_rows} rows of the token "
            f"features of {cache.label}; {RECOMPUTE}"
        )
    lists: Any = table["indices"].combine_chunks()
    stored, nonzero = np.diff(lists.offsets.to_numpy()), table["nonzero"].to_numpy()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    _check_tokens(cache, shard, table, [responses[int(number)] for number in owner], lengths)
    short = np.flatnonzero(stored < np.minimum(k, nonzero))
    if len(short):
        first = int(short[0])
        raise FPOError(
            f"shard {shard}, token row {first}: train.k={k}, the token features of {cache.label} "
            f"store {stored[first]} of {nonzero[first]}; raise features.tokens_k, or lower train.k"
        )
    width = max(1, int(stored.max(initial=0)))
    filled = np.arange(width) < stored[:, None]
    indices = np.full(filled.shape, -1, dtype=np.int32)
    values = np.zeros(filled.shape, dtype=np.float32)
    indices[filled] = lists.flatten().to_numpy()
    values[filled] = table["values"].combine_chunks().flatten().to_numpy()
    # What is left out of a token is at most the last value that is stored.
    last = values[np.arange(len(values)), np.maximum(stored - 1, 0)]
    cutoff = np.where(nonzero > stored, last, 0.0).astype(np.float32)
    ends = np.cumsum(lengths)[:-1]
    parts = (np.split(column, ends) for column in (indices, values, cutoff))
    return [TokenFeatures(*columns) for columns in zip(*parts, strict=True)]


def _check_tokens(
    cache: FeatureShards,
    shard: int,
    table: pa.Table,
    responses: Sequence[dict],
    lengths: Sequence[int],
) -> None:
    """Refuse token rows of other tokens than their place says, or of another SAE."""
    wanted = {
        "pair_id": [row["pair_id"] for row in responses],
        "side": [row["side"] for row in responses],
        "position": [position for length in lengths for position in range(length)],
    }
    for name, values in wanted.items():
        found = table[name].to_pylist()
        if found != values:
            row = next(
                n for n, pair in enumerate(zip(found, values, strict=True)) if len(set(pair)) > 1
            )
            raise FPOError(
                f"shard {shard}, token row {row}: the token features of {cache.label} have the "
                f"{name} {found[row]} where {values[row]} should be; {RECOMPUTE}"
            )
    indices: Any = table["indices"].combine_chunks()
    highest = int(indices.flatten().to_numpy().max(initial=0))
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
        highest = max(max(ids) for ids in example.ids[1:])
        if highest >= size:
            raise FPOError(
                f"pair {example.ids.pair_id} has the token id {highest}, the model's vocabulary "
                f"has {size}: `pairs` was made with another tokenizer; rerun from tokenize"
            )


def epoch_batches(
    num_examples: int, batch_size: int, epochs: int, seed: int
) -> Iterator[list[int]]:
    """Row numbers of every optimizer step's global batch; a pure function of its arguments.

    An epoch's last batch may be smaller; it is trained on all the same.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()
        for start in range(0, num_examples, batch_size):
            yield order[start : start + batch_size]


def num_steps(num_examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run."""
    return epochs * -(-num_examples // batch_size)
