"""Rows like those of the quickstart's feature tables, for benchmarks/parquet.py.

Popularity of the features, values, lengths and repeats follow the quickstart's own features.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from storage.schemas import FEATURES_POOLED, FEATURES_TOKENS

D_SAE = 16384
PAIRS_PER_SHARD = 512


def token_shards(shards: int) -> list[pa.Table]:
    """Shards of features/tokens: 32 features a token, of which a quarter the response repeats."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(shards):
        lengths = np.clip(rng.normal(244, 80, 2 * PAIRS_PER_SHARD), 20, 500).astype(int)
        response = np.repeat(np.arange(len(lengths)), lengths)
        rows = len(response)
        indices, values = features(rng, rows, k=32, loudest=55, response=response)
        made.append(
            pa.table(
                {
                    **responses(rng, response),
                    "position": np.concatenate([np.arange(length) for length in lengths]),
                    "token_id": popular(rng, 49152, rows),
                    "indices": indices,
                    "values": values,
                    "nonzero": np.clip(rng.normal(53, 8, rows), 20, 200).astype(int),
                },
                schema=FEATURES_TOKENS,
            )
        )
    return made


def pooled_shards(shards: int) -> list[pa.Table]:
    """Shards of features/pooled: 256 features a response."""
    rng = np.random.default_rng(1)
    made = []
    for _ in range(shards):
        rows = 2 * PAIRS_PER_SHARD
        indices, values = features(rng, rows, k=256, loudest=14)
        made.append(
            pa.table(
                {
                    **responses(rng, np.arange(rows)),
                    "n_tokens": np.clip(rng.normal(244, 80, rows), 20, 500).astype(int),
                    "indices": indices,
                    "values": values,
                    "nonzero": rng.normal(850, 60, rows).astype(int),
                    "mass": rng.normal(650, 40, rows),
                    "cutoff": rng.normal(0.68, 0.03, rows),
                    "pinned": [[]] * rows,
                    "pinned_values": [[]] * rows,
                },
                schema=FEATURES_POOLED,
            )
        )
    return made


def responses(rng: np.random.Generator, response: np.ndarray) -> dict[str, list[str]]:
    """``pair_id`` and ``side`` of each row, from the number of its response."""
    pairs = [rng.bytes(8).hex() for _ in range(PAIRS_PER_SHARD)]
    return {
        "pair_id": [pairs[number // 2] for number in response],
        "side": [("chosen", "rejected")[number % 2] for number in response],
    }


def popular(rng: np.random.Generator, choices: int, size: Any) -> np.ndarray:
    """Draws by a Zipf-like law with a flat head; small numbers are the popular ones."""
    weights = (np.arange(choices) + 20.0) ** -0.9
    limits = np.cumsum(weights) / weights.sum()
    return np.searchsorted(limits, rng.random(size)).astype(np.uint32)


def features(
    rng: np.random.Generator,
    rows: int,
    *,
    k: int,
    loudest: float,
    response: np.ndarray | None = None,
) -> tuple[pa.Array, pa.Array]:
    """``indices`` and ``values``: k different features a row, values falling by a power law.

    More are drawn than needed, and repeats of a feature within a row are left out.
    """
    drawn = popular(rng, D_SAE, (rows, k + k // 3))
    if response is not None:
        own = popular(rng, D_SAE, (response[-1] + 1, 64))
        repeated = rng.random(drawn.shape) < 0.25
        which = rng.integers(64, size=drawn.shape)
        drawn = np.where(repeated, own[response[:, None], which], drawn)
    order = np.argsort(drawn, axis=1, kind="stable")
    first = np.ones(drawn.shape, bool)
    ranked = np.take_along_axis(drawn, order, axis=1)
    np.put_along_axis(first, order[:, 1:], ranked[:, 1:] != ranked[:, :-1], axis=1)
    wanted = first & (np.cumsum(first, axis=1) <= k)
    counts = wanted.sum(axis=1)
    values = loudest * np.arange(1, k + 1) ** -0.55 * np.exp(rng.normal(0, 0.25, (rows, k)))
    values = -np.sort(-values.astype(np.float32), axis=1)
    # A row that found fewer than k features has fewer, as tokens with few active ones do.
    values = values[np.arange(k) < counts[:, None]]
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    kinds = FEATURES_TOKENS.field("indices").type, FEATURES_TOKENS.field("values").type
    indices, activations = (
        pa.ListArray.from_arrays(offsets, pa.array(flat), type=kind)
        for flat, kind in zip((drawn[wanted], values), kinds, strict=True)
    )
    return indices, activations
