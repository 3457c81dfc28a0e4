"""Pairs of a cache: prompt, both responses by token, and the features in which they differ."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from explorer.cache import FeatureCache
from explorer.features import TokenPiece, pair_columns, response_pieces, token_values
from explorer.index import PairIndex
from explorer.labels import Labels
from storage.schemas import names_beside

SIDES = ("chosen", "rejected")
DIFFERING = 20
PROMPT_END = 40  # tokens of a prompt in the list, its last ones
SHOWN_PROMPT = 400  # tokens of a prompt that are shown, its last ones


class PairRow(NamedTuple):
    """One line of the list."""

    pair_id: str
    prompt: str
    chosen_tokens: int
    rejected_tokens: int
    metadata: dict[str, Any]


class Differing(NamedTuple):
    """A feature whose means differ between the responses."""

    feature: int
    label: str
    chosen: float
    rejected: float

    @property
    def difference(self) -> float:
        """Chosen less rejected."""
        return self.chosen - self.rejected


class PairView(NamedTuple):
    """What there is to see of a pair."""

    pair_id: str
    split: str
    source: str
    prompt: tuple[str, ...]
    prompt_left_out: int  # tokens before those that are shown
    chosen: tuple[TokenPiece, ...]
    rejected: tuple[TokenPiece, ...]
    differing: tuple[Differing, ...]
    metadata: dict[str, Any]


def pair_list(
    cache: FeatureCache,
    index: PairIndex,
    offset: int,
    limit: int,
    numbers: np.ndarray | None = None,
) -> list[PairRow]:
    """Return some pairs, in the order of the tables.

    Args:
        cache: The cache.
        index: Its index.
        offset: Pairs to leave out at the start.
        limit: Most pairs to return.
        numbers: The pairs to choose from, ascending; None: all.
    """
    every = np.arange(cache.n_pairs) if numbers is None else numbers
    shown = every[offset : offset + limit]
    rows = []
    for number, found in zip(shown, _in_order(cache, index, shown), strict=True):
        chosen, rejected = (int(index.lengths[2 * number + side]) for side in (0, 1))
        rows.append(
            PairRow(
                pair_id=found["pair_id"],
                prompt=cache.detokenizer.text(found["prompt_ids"]),
                chosen_tokens=chosen,
                rejected_tokens=rejected,
                metadata={name: found[name] for name in cache.metadata},
            )
        )
    return rows


def pair_frame(cache: FeatureCache, rows: Sequence[PairRow]) -> pl.DataFrame:
    """Return lines of the list as a table, the metadata behind the other columns."""
    own = PairRow._fields[:-1]
    names = names_beside(cache.metadata, own)
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in own}
    kinds = {pa.string(): pl.String, pa.bool_(): pl.Boolean, pa.int64(): pl.Int64}
    for name, kind in cache.metadata.items():
        values = [row.metadata[name] for row in rows]
        columns[names[name]] = pl.Series(values, dtype=kinds.get(kind, pl.Float64))
    return pl.DataFrame(columns)


def _in_order(
    cache: FeatureCache, index: PairIndex, numbers: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Yield prompt and metadata of pairs in ascending order, each shard read once."""
    columns = ["pair_id", "prompt_ids", *cache.metadata]
    shards = np.searchsorted(index.shards, 2 * numbers, side="right") - 1
    for shard in np.unique(shards):
        places = numbers[shards == shard] - int(index.shards[shard]) // 2
        rows = slice(int(places[0]), int(places[-1]) + 1)
        table = cache.pairs.rows("", int(shard), rows, columns)
        yield from table.take(places - places[0]).to_pylist()


def pair_view(
    cache: FeatureCache, index: PairIndex, pair_id: str, feature: int | None = None,
    labels: Labels | None = None,
) -> PairView:  # fmt: skip
    """What there is to see of a pair.

    Args:
        cache: the cache.
        index: its index.
        pair_id: the pair.
        feature: whose activations the tokens carry; None: of none.
        labels: names of features.

    Raises:
        NotThere: no such pair, or no such feature.
    """
    number = index.pair_number(pair_id)
    if feature is not None:
        cache.check_feature(feature)
    sides = [f"{side}_{part}" for side in SIDES for part in ("ids", "unscored")]
    pair = pair_columns(
        cache, index, number, ["split", "source", "prompt_ids", *sides, *cache.metadata]
    )
    prompt = pair["prompt_ids"]
    shown = prompt[-SHOWN_PROMPT:]

    def response(side: int) -> tuple[TokenPiece, ...]:
        values = {} if feature is None else token_values(cache, index, 2 * number + side, feature)
        ids, unscored = (pair[f"{SIDES[side]}_{part}"] for part in ("ids", "unscored"))
        return response_pieces(cache, ids, unscored, values)

    return PairView(
        pair_id=pair_id,
        split=pair["split"],
        source=pair["source"],
        prompt=tuple(cache.detokenizer.pieces(shown)),
        prompt_left_out=len(prompt) - len(shown),
        chosen=response(0),
        rejected=response(1),
        differing=_differing(cache, index, number, labels),
        metadata={name: pair[name] for name in cache.metadata},
    )


def _differing(
    cache: FeatureCache, index: PairIndex, number: int, labels: Labels | None
) -> tuple[Differing, ...]:
    """The features whose pooled values differ most; one that is not stored reads as 0."""
    shard, place = index.shard_of(2 * number)
    table = cache.artifact.rows("pooled", shard, slice(place, place + 2), ["indices", "values"])
    sides = []
    for indices, values in zip(table["indices"], table["values"], strict=True):
        dense = np.zeros(cache.sae.d_sae, dtype=np.float32)
        dense[np.asarray(indices.values)] = np.asarray(values.values)
        sides.append(dense)
    order = np.argsort(-np.abs(sides[0] - sides[1]), kind="stable")[:DIFFERING]
    return tuple(
        Differing(int(one), labels.text(one) if labels else "", float(sides[0][one]),
                  float(sides[1][one]))
        for one in order if sides[0][one] != sides[1][one]
    )  # fmt: skip
