"""Features of a cache: the table of all, and the page of one."""

from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from explorer.cache import FeatureCache
from explorer.index import FeatureIndex
from explorer.labels import Labels
from fpo_core.errors import UsageError

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
    histogram: Histogram
    examples: tuple[Example, ...]
    top_tokens: tuple[tuple[str, int, float], ...]  # piece, times among the examples, strongest


def feature_table(
    cache: FeatureCache, query: FeatureQuery, labels: Labels | None = None
) -> FeaturePage:
    """Features by a query.

    Raises:
        UsageError: an unknown order, or bounds that are none.
    """
    if query.sort not in SORTS:
        raise UsageError(f"unknown order {query.sort!r}; one of {', '.join(SORTS)}")
    if not 0 <= query.min_density <= query.max_density <= 1:
        raise UsageError("densities are shares: 0 <= min_density <= max_density <= 1")
    frame = cache.small_stats
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
    cache: FeatureCache, index: FeatureIndex, feature: int, examples: int = 10,
    labels: Labels | None = None,
) -> FeatureView:  # fmt: skip
    """What there is to see of a feature.

    Raises:
        NotThere: the SAE has no such feature.
    """
    cache.check_feature(feature)
    stats = cache.artifact.shard_path(0, "stats")
    table = pq.read_table(stats, filters=[("feature", "=", feature)])
    row = table.to_pylist()[0]
    strongest = row.pop("examples")[:examples]
    row["difference"] = row["mean_chosen"] - row["mean_rejected"]
    found = tuple(_example(cache, index, feature, one) for one in strongest)
    return FeatureView(
        feature, labels.text(feature) if labels else "", row, _histogram(cache, index, feature),
        found, _top_tokens(found),
    )  # fmt: skip


def _histogram(cache: FeatureCache, index: FeatureIndex, feature: int) -> Histogram:
    rows, values = index.entries(feature)
    top = float(values.max()) if len(values) else 1.0
    edges = np.linspace(0, top, BINS + 1)
    sides = [values[rows % 2 == side] for side in (0, 1)]
    chosen, rejected = (np.histogram(side, edges)[0] for side in sides)
    without = cache.n_pairs - len(sides[0]), cache.n_pairs - len(sides[1])
    return Histogram(edges, chosen, rejected, without)


def _example(
    cache: FeatureCache, index: FeatureIndex, feature: int, found: dict[str, Any]
) -> Example:
    position = found["position"]
    row = 2 * index.pair_number(found["pair_id"]) + (found["side"] == "rejected")
    start = max(0, position - CONTEXT)
    ids = response_ids(cache, index, row)[start : position + CONTEXT + 1]
    values = token_values(cache, index, row, feature)
    values[position] = found["value"]  # sampled token tables may leave it out
    pieces = cache.detokenizer.pieces(ids)
    return Example(
        found["pair_id"], found["side"], position, found["value"],
        tuple(
            TokenPiece(piece, values.get(place, 0.0), place)
            for place, piece in enumerate(pieces, start)
        ),
    )  # fmt: skip


def response_ids(cache: FeatureCache, index: FeatureIndex, row: int) -> list[int]:
    """The token ids of a response, by its row in ``pooled``."""
    column = "rejected_ids" if row % 2 else "chosen_ids"
    return pair_columns(cache, index, row // 2, [column])[column]


def pair_columns(
    cache: FeatureCache, index: FeatureIndex, pair: int, columns: list[str]
) -> dict[str, Any]:
    """Some columns of one pair: only the row group that it is in is read."""
    shard, place = index.shard_of(2 * pair)
    return _rows(cache.pairs.shard_path(shard), slice(place // 2, place // 2 + 1), columns)[0]


def token_values(
    cache: FeatureCache, index: FeatureIndex, row: int, feature: int
) -> dict[int, float]:
    """A feature's stored activations in a response, by position."""
    found = {}
    for token in token_features(cache, index, row):
        if feature in token["indices"]:
            place = token["indices"].index(feature)
            found[token["position"]] = token["values"][place]
    return found


def token_features(cache: FeatureCache, index: FeatureIndex, row: int) -> list[dict[str, Any]]:
    """The rows of the token table that are of a response."""
    shard, _ = index.shard_of(row)
    path, columns = cache.artifact.shard_path(shard, "tokens"), ["position", "indices", "values"]
    if cache.artifact.manifest["recipe"].get("tokens_share", 1.0) >= 1:
        return _rows(path, index.token_rows(row), columns)
    pair_id, side = index_row(cache, index, row)
    table = pq.read_table(
        path, columns=columns, filters=[("pair_id", "=", pair_id), ("side", "=", side)]
    )
    return table.to_pylist()


def index_row(cache: FeatureCache, index: FeatureIndex, row: int) -> tuple[str, str]:
    """Pair id and side of a row of ``pooled``."""
    pair_id = pair_columns(cache, index, row // 2, ["pair_id"])["pair_id"]
    return pair_id, "rejected" if row % 2 else "chosen"


def _rows(path: Any, rows: slice, columns: list[str]) -> list[dict[str, Any]]:
    """Some rows of a Parquet file, of whose row groups only those are read that hold them."""
    with pq.ParquetFile(path) as file:
        ends = np.cumsum([file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)])
        first = int(np.searchsorted(ends, rows.start, side="right"))
        last = int(np.searchsorted(ends, rows.stop - 1, side="right"))
        table = file.read_row_groups(list(range(first, last + 1)), columns)
        begin = int(ends[first - 1]) if first else 0
    return table.slice(rows.start - begin, rows.stop - rows.start).to_pylist()


def _top_tokens(examples: tuple[Example, ...]) -> tuple[tuple[str, int, float], ...]:
    """The tokens that the strongest activations are at."""
    found: dict[str, list[float]] = {}
    for example in examples:
        (piece,) = (one for one in example.pieces if one.position == example.position)
        found.setdefault(piece.text, []).append(example.value)
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), -max(item[1])))
    return tuple((text, len(values), max(values)) for text, values in ranked)
