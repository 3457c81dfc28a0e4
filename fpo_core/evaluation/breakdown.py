"""Results by group: every held-out metric over the pairs that share a metadata value.

Metrics, intervals and seed are those of the whole held-out set, so a group of all pairs has its
numbers. Groups of a column never overlap and hold every pair once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from fpo_core.evaluation.heldout import HeldoutScores
from fpo_core.evaluation.metrics import Estimate, heldout_metrics

MOST_GROUPS = 20  # of values; more are cut into ranges, or the rarest are put together
NULL, OTHER, RANGE, VALUE = "null", "other", "range", "value"
QUARTERS = 4
DIGITS = 4  # of a range's ends; more where ends would look the same
ESTIMATES = ("reference", "policy", "difference")
BREAKDOWN_SCHEMA = {
    "column": pl.String,
    "group": pl.String,
    "kind": pl.String,
    "values": pl.Int32,
    "pairs": pl.Int32,
    "metric": pl.String,
    **{f"{name}{end}": pl.Float64 for name in ESTIMATES for end in ("", "_low", "_high")},
}


class PairGroup(NamedTuple):
    """Pairs that share a value, or a range of values, of one metadata column."""

    name: str
    kind: str  # value, range, other or null
    values: int  # distinct values in it
    rows: np.ndarray  # numbers of its pairs, ascending


def break_down(
    scores: HeldoutScores, metadata: pl.DataFrame, resamples: int, seed: int
) -> pl.DataFrame:
    """Return every metric of every group of every metadata column.

    Args:
        scores: Scores of the held-out pairs.
        metadata: A row per pair, in the order of the scores, and a column per metadata name.
        resamples: Draws per bootstrap interval.
        seed: Seed of the draws.

    Returns:
        A row per column, group and metric, with the columns of ``BREAKDOWN_SCHEMA``.
    """
    assert not metadata.width or metadata.height == len(scores.pair_ids)
    rows = []
    for column in metadata.iter_columns():
        for group in group_pairs(column):
            named = {
                "column": column.name,
                "group": group.name,
                "kind": group.kind,
                "values": group.values,
                "pairs": len(group.rows),
            }
            rows += [named | one for one in _metrics(_select(scores, group.rows), resamples, seed)]
    return pl.DataFrame(rows, schema=BREAKDOWN_SCHEMA)


def group_pairs(column: pl.Series) -> list[PairGroup]:
    """Return the groups of a metadata column.

    Up to 20 values are a group each; fractions never are. More numbers are cut at the quartiles; of
    more texts, the 19 most frequent are a group each and the rest is the group ``other``. Pairs
    without a value are a group. NaN is no value.

    Args:
        column: A value per pair: string, integer, float or bool.
    """
    values = column.fill_nan(None) if column.dtype.is_float() else column
    known = values.drop_nulls()
    few = known.n_unique() <= MOST_GROUPS
    fractions = values.dtype.is_float() and bool((known != known.floor()).any())
    cut = values.dtype.is_numeric() and (fractions or not few)
    groups = _ranges(values) if cut else _by_value(values)
    missing = np.flatnonzero(values.is_null().to_numpy())
    return [*groups, PairGroup(NULL, NULL, 0, missing)] if len(missing) else groups


def _by_value(values: pl.Series) -> list[PairGroup]:
    """Return a group per value: texts by falling frequency, everything else ascending."""
    frame = pl.DataFrame({"value": values}).with_row_index("row").drop_nulls("value")
    found = frame.group_by("value").agg("row", pl.len())
    if values.dtype == pl.String:
        found = found.sort(["len", "value"], descending=[True, False])
    else:
        found = found.sort("value")
    shown = found.height if found.height <= MOST_GROUPS else MOST_GROUPS - 1
    groups = [
        PairGroup(name=_name(value), kind=VALUE, values=1, rows=np.sort(np.array(rows)))
        for value, rows, _ in found.head(shown).iter_rows()
    ]
    rest = found.tail(found.height - shown)
    if rest.height:
        rows = np.sort(rest["row"].explode().to_numpy())
        groups.append(PairGroup(name=OTHER, kind=OTHER, values=rest.height, rows=rows))
    return groups


def _ranges(values: pl.Series) -> list[PairGroup]:
    """Return a group per quarter of the sorted values; equal values share a group."""
    known = values.drop_nulls().sort().to_numpy()
    last = [-(-len(known) * quarter // QUARTERS) - 1 for quarter in range(1, QUARTERS)]
    edges = np.unique(known[np.maximum(last, 0)])
    rows = np.flatnonzero(values.is_not_null().to_numpy())
    quarters = np.searchsorted(edges, values.drop_nulls().to_numpy())
    inside = [rows[quarters == quarter] for quarter in np.unique(quarters)]
    held = [values.gather(one) for one in inside]
    names = _range_names([(one.min(), one.max()) for one in held])
    return [
        PairGroup(name=name, kind=RANGE, values=one.n_unique(), rows=rows)
        for name, one, rows in zip(names, held, inside, strict=True)
    ]


def _range_names(ends: Sequence[tuple[Any, Any]]) -> list[str]:
    """Return "low to high" per range, with the digits that tell different ends apart."""
    different = {end for pair in ends for end in pair}
    digits = next(
        (
            n
            for n in range(DIGITS, 17)
            if len({_name(end, n) for end in different}) == len(different)
        ),
        17,
    )
    names = [tuple(_name(end, digits) for end in pair) for pair in ends]
    return [low if low == high else f"{low} to {high}" for low, high in names]


def _name(value: Any, digits: int = 17) -> str:
    """Return a value as text, a fraction with some digits more than its whole part has."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if value.is_integer() and abs(value) < 10**15:
        return str(int(value))
    return f"{value:.{digits + max(0, math.floor(math.log10(abs(value))))}g}"


def _select(scores: HeldoutScores, rows: np.ndarray) -> HeldoutScores:
    """Return the scores of some pairs; how features moved is not by pair and stays as it is."""
    ids = [scores.pair_ids[row] for row in rows]
    return scores._replace(
        pair_ids=ids, **{name: values[rows] for name, values in scores.by_pair().items()}
    )


def _metrics(scores: HeldoutScores, resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield a row per metric; an estimate that is not defined is null."""
    for metric in heldout_metrics(scores, resamples, seed):
        row: dict[str, Any] = {"metric": metric.key}
        for name in ESTIMATES:
            estimate: Estimate | None = getattr(metric, name)
            if estimate is not None:
                row |= {
                    name: estimate.value,
                    f"{name}_low": estimate.low,
                    f"{name}_high": estimate.high,
                }
        yield row
