"""Features of a cache: the table of all, and the page of one."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from explorer.cache import SMALL, FeatureCache
from explorer.index import FeatureIndex, PairIndex
from explorer.labels import Labels
from fpo_core.errors import UsageError
from fpo_core.lists import lists_of

SORTS = {
    "difference": "mean on chosen less mean on rejected",
    "change": "the same, whatever its sign",
    "ratio": "difference over their sum: how one-sided it is",
    "density": "share of scored tokens where it is active",
    "mean": "mean activation over scored tokens",
    "max": "largest activation",
    "feature": "its index",
}
BINS = 24
CONTEXT = 24  # tokens before and after an example's
READERS = 4  # examples that are read at a time


class FeatureQuery(NamedTuple):
    """Which features, in which order."""

    sort: str = "difference"
    descending: bool = True
    min_density: float = 0.0
    max_density: float = 1.0
    search: str = ""  # in labels, or an index
    offset: int = 0
    limit: int = 50


class FeaturePage(NamedTuple):
    """A part of the table."""

    total: int
    rows: pl.DataFrame  # feature, label, density, mean, max, mean_chosen, mean_rejected, difference


class TokenPiece(NamedTuple):
    """A token of a response."""

    text: str
    value: float  # the feature's activation there, 0 where it is not among the stored ones
    position: int
    scored: bool  # False: of another speaker's turn, where no feature is read


class Example(NamedTuple):
    """A strong activation, in its context."""

    pair_id: str
    side: str
    position: int
    value: float
    pieces: tuple[TokenPiece, ...]


class Histogram(NamedTuple):
    """Means of a feature over responses, by side; responses where it is 0, or not stored, apart."""

    edges: np.ndarray  # [B + 1]
    chosen: np.ndarray  # [B]
    rejected: np.ndarray  # [B]
    without: tuple[int, int]  # chosen and rejected responses that are in no bin


class FeatureView(NamedTuple):
    """What there is to see of a feature."""

    feature: int
    label: str
    stats: dict[str, Any]
    examples: tuple[Example, ...]
    top_tokens: tuple[tuple[str, int, float], ...]  # piece, times among the examples, strongest


def feature_table(
    cache: FeatureCache,
    query: FeatureQuery,
    labels: Labels | None = None,
    stats: pl.DataFrame | None = None,
) -> FeaturePage:
    """Return features by a query.

    Args:
        cache: The cache.
        query: Which features, in which order.
        labels: Names of features.
        stats: Statistics to use instead of those of all pairs, with the same columns.

    Raises:
        UsageError: an unknown order, or bounds that are none.
    """
    if query.sort not in SORTS:
        raise UsageError(f"unknown order {query.sort!r}; one of {', '.join(SORTS)}")
    if not 0 <= query.min_density <= query.max_density <= 1:
        raise UsageError("densities are shares: 0 <= min_density <= max_density <= 1")
    frame = cache.small_stats if stats is None else stats
    both = pl.col("mean_chosen") + pl.col("mean_rejected")
    order = {
        "change": pl.col("difference").abs(),
        "ratio": pl.when(both > 0).then(pl.col("difference") / both).otherwise(0.0),
    }.get(query.sort, pl.col(query.sort))
    found = frame.filter(pl.col("density").is_between(query.min_density, query.max_density))
    if query.search:
        wanted = {int(query.search)} if query.search.isdigit() else set()
        wanted |= labels.search(query.search) if labels else set()
        found = found.filter(pl.col("feature").is_in(sorted(wanted)))
    found = found.sort([order, "feature"], descending=[query.descending, False])
    rows = found.slice(query.offset, query.limit)
    named = [labels.text(one) if labels else "" for one in rows["feature"].to_list()]
    rows = rows.insert_column(1, pl.Series("label", named, dtype=pl.String))
    return FeaturePage(found.height, rows)


def feature_view(
    cache: FeatureCache, index: PairIndex, feature: int, examples: int = 10,
    labels: Labels | None = None,
) -> FeatureView:  # fmt: skip
    """What there is to see of a feature; its distribution is ``feature_histogram``'s.

    Raises:
        NotThere: the SAE has no such feature.
    """
    cache.check_feature(feature)
    columns = [*SMALL, "examples"]
    row = cache.artifact.rows("stats", 0, slice(feature, feature + 1), columns).to_pylist()[0]
    strongest = row.pop("examples")[:examples]
    row["difference"] = row["mean_chosen"] - row["mean_rejected"]
    with ThreadPoolExecutor(READERS) as pool:
        found = tuple(pool.map(lambda one: _example(cache, index, feature, one), strongest))
    label = labels.text(feature) if labels else ""
    return FeatureView(feature, label, row, found, _top_tokens(found))


def feature_histogram(cache: FeatureCache, index: FeatureIndex, feature: int) -> Histogram:
    """How a feature's means are spread over the responses.

    Raises:
        NotThere: the SAE has no such feature.
    """
    cache.check_feature(feature)
    rows, values = index.entries(feature)
    top = float(values.max()) if len(values) else 1.0
    edges = np.linspace(0, top, BINS + 1)
    sides = [values[rows % 2 == side] for side in (0, 1)]
    chosen, rejected = (np.histogram(side, edges)[0] for side in sides)
    without = cache.n_pairs - len(sides[0]), cache.n_pairs - len(sides[1])
    return Histogram(edges, chosen, rejected, without)


def _example(cache: FeatureCache, index: PairIndex, feature: int, found: dict[str, Any]) -> Example:
    position = found["position"]
    row = 2 * index.pair_number(found["pair_id"]) + (found["side"] == "rejected")
    start = max(0, position - CONTEXT)
    names = [f"{found['side']}_{part}" for part in ("ids", "unscored")]
    columns = pair_columns(cache, index, row // 2, names)
    ids, unscored = (columns[name] for name in names)
    values = token_values(cache, index, row, feature)
    values[position] = found["value"]  # sampled token tables may leave it out
    pieces = response_pieces(cache, ids, unscored, values, slice(start, position + CONTEXT + 1))
    return Example(
        pair_id=found["pair_id"],
        side=found["side"],
        position=position,
        value=found["value"],
        pieces=pieces,
    )


def response_pieces(
    cache: FeatureCache,
    ids: Sequence[int],
    unscored: Sequence[int],
    values: Mapping[int, float],
    part: slice = slice(None),
) -> tuple[TokenPiece, ...]:
    """Return the tokens of a response as they are shown.

    Args:
        cache: whose detokenizer to use.
        ids: the response.
        unscored: its ranges that are not scored: start, stop, start, stop, ...
        values: a feature's activations, by position.
        part: the tokens to return.
    """
    left_out = {
        position
        for start, stop in zip(unscored[0::2], unscored[1::2], strict=True)
        for position in range(start, stop)
    }
    return tuple(
        TokenPiece(
            text=text,
            value=values.get(position, 0.0),
            position=position,
            scored=position not in left_out,
        )
        for position, text in zip(
            range(len(ids))[part], cache.detokenizer.pieces(ids[part]), strict=True
        )
    )


def pair_columns(
    cache: FeatureCache, index: PairIndex, pair: int, columns: list[str]
) -> dict[str, Any]:
    """Return some columns of one pair, by its number.

    Ranges of unscored tokens are empty where the table is from before their columns.
    """
    shard, place = index.shard_of(2 * pair)
    rows = slice(place // 2, place // 2 + 1)
    found = cache.pairs.rows("", shard, rows, columns).to_pylist()[0]
    return {name: [] for name in columns if name.endswith("_unscored")} | found


def token_values(cache: FeatureCache, index: PairIndex, row: int, feature: int) -> dict[int, float]:
    """A feature's stored activations in a response, by position."""
    shard, _ = index.shard_of(row)
    rows = _token_rows(cache, index, row)
    if rows.start == rows.stop:
        return {}
    table = cache.artifact.rows("tokens", shard, rows, ["position", "indices", "values"])
    indices, values = lists_of(table, "indices"), lists_of(table, "values").values
    positions = np.repeat(table["position"].to_numpy(), indices.lengths)
    mine = indices.values == feature
    return dict(zip(positions[mine].tolist(), values[mine].tolist(), strict=True))


def _token_rows(cache: FeatureCache, index: PairIndex, row: int) -> slice:
    """The rows of the shard's token table that are of a response."""
    if cache.artifact.manifest["recipe"].get("tokens_share", 1.0) >= 1:
        return index.token_rows(row)
    shard, _ = index.shard_of(row)
    keys = pl.DataFrame(cache.artifact.rows("tokens", shard, None, ["pair_id", "side"]))
    side = "rejected" if row % 2 else "chosen"
    found = keys.with_row_index().filter(pair_id=index.pair_id(row // 2), side=side)["index"]
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def _top_tokens(examples: tuple[Example, ...]) -> tuple[tuple[str, int, float], ...]:
    """The tokens that the strongest activations are at."""
    found: dict[str, list[float]] = {}
    for example in examples:
        (piece,) = (one for one in example.pieces if one.position == example.position)
        found.setdefault(piece.text, []).append(example.value)
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), -max(item[1])))
    return tuple((text, len(values), max(values)) for text, values in ranked)
