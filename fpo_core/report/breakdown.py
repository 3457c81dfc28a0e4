"""Results by group: a table and a chart of accuracy per metadata column."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import polars as pl

from fpo_core.report import palette
from fpo_core.report.charts import ROW_HEIGHT, Figure, figure
from fpo_core.report.comparison_tables import Table
from fpo_core.report.findings import with_unit
from fpo_core.report.human import NARROW, NOT_MEASURED, decimals_for
from fpo_core.report.model import RunReport
from fpo_core.report.view import Value

FIGURE_NAMES = "results_by_"  # and the number of the column: names come from the recipe
FEW_PAIRS = 10
LONGEST, LONGEST_LABEL = 80, 18  # characters of a group's name, in the table and in the chart
COLUMNS = (
    "Group",
    "Pairs",
    "Accuracy before",
    "Accuracy after",
    "Change",
    "Margin after",
    "KL chosen",
    "KL rejected",
    "Discrepancy",
)
ALONE = ("kl_chosen", "kl_rejected", "discrepancy")  # which the reference does not have
CHARACTER = 7.5  # pixels of a label's character in a wide font; Vega measures a narrow one
APART = {"reference": -6, "policy": 6}  # pixels from the middle of a group's row

NOTE = (
    "The small numbers are 95 % intervals of a paired bootstrap within the group. Margin, KL and "
    "discrepancy are means over its pairs. breakdown.parquet of the evaluation has every metric "
    "with its interval."
)
FEW_NOTE = f" Few pairs are fewer than {FEW_PAIRS}: their intervals can be too narrow."

Metrics = Mapping[str, Mapping[str, Any]]  # the table's row of each metric


class Group(NamedTuple):
    """One group of one column."""

    name: str
    pairs: int
    metrics: Metrics

    @property
    def is_small(self) -> bool:
        """Whether its intervals say little."""
        return self.pairs < FEW_PAIRS


class Section(NamedTuple):
    """One metadata column, ready for the page."""

    number: int
    column: str
    table: Table
    figure: Figure | None  # None: no group has an accuracy


def sections(report: RunReport) -> tuple[Section, ...]:
    """Return a section per metadata column of the run's breakdown."""
    if report.breakdown.is_empty():
        return ()
    return tuple(
        _section(number, frame, report)
        for number, frame in enumerate(
            report.breakdown.partition_by("column", maintain_order=True), 1
        )
    )


def _section(number: int, frame: pl.DataFrame, report: RunReport) -> Section:
    column = frame["column"][0]
    groups = [
        Group(
            _group_name(one.row(0, named=True)),
            one["pairs"][0],
            {row["metric"]: row for row in one.iter_rows(named=True)},
        )
        for one in frame.partition_by("group", "kind", maintain_order=True)
    ]
    note = NOTE + FEW_NOTE * any(group.is_small for group in groups)
    overall = _overall(report)
    rows = tuple(_row(group, frame) for group in ([overall] if overall else []) + groups)
    table = Table(
        name="",
        title=f"Results by {column}",
        columns=COLUMNS,
        names=1,
        rows=rows,
        note=note,
        data=frame,
    )
    return Section(number, column, table, _figure(number, column, groups))


def _overall(report: RunReport) -> Group | None:
    """Return all held-out pairs as a group, to compare with."""
    if report.heldout_pairs is None or not report.metrics:
        return None
    metrics = {}
    for metric in report.metrics:
        row = metrics[metric.key] = {}
        for name in ("reference", "policy", "difference"):
            found = getattr(metric, name)
            for end, value in (("", "value"), ("_low", "low"), ("_high", "high")):
                row[f"{name}{end}"] = None if found is None else getattr(found, value)
    return Group("(all pairs)", report.heldout_pairs, metrics)


def _group_name(row: Mapping[str, Any]) -> str:
    """Return a group's name; those that are not values of the data stand in brackets."""
    if row["kind"] == "null":
        return "(no value)"
    if row["kind"] == "other":
        return f"(other: {row['values']} values)"
    return _short(row["group"], LONGEST) or "(empty)"


def _short(name: str, longest: int) -> str:
    words = " ".join(name[: 4 * longest].split())
    return words if len(words) <= longest else f"{words[:longest]}…"


def _row(group: Group, frame: pl.DataFrame) -> tuple[Value, ...]:
    accuracy = group.metrics.get("accuracy", {})
    margins = group.metrics.get("margin", {})
    before, after = (
        _number(margins.get(who), _decimals(frame, "margin")) for who in ("reference", "policy")
    )
    return (
        Value(group.name, ""),
        Value(f"{group.pairs:,}", "few pairs" if group.is_small else ""),
        *(_share(accuracy, name) for name in ("reference", "policy", "difference")),
        Value(after, f"{before} before"),
        *(
            Value(_number(group.metrics.get(key, {}).get("policy"), _decimals(frame, key)), "")
            for key in ALONE
        ),
    )


def _share(row: Mapping[str, Any], name: str) -> Value:
    ends = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    found = [one for one in ends if one is not None and math.isfinite(one)]
    if len(found) < 3:
        return Value(NOT_MEASURED, "")
    sign = name == "difference"
    value, low, high = (with_unit(one, "share", 3, difference=sign) for one in found)
    return Value(value, f"{low} to {high}".replace(f"{NARROW}%", ""))


def _decimals(frame: pl.DataFrame, metric: str) -> int:
    """Return the decimals that tell a metric's groups apart, the same in every row."""
    values = frame.filter(pl.col("metric") == metric)["policy"].drop_nulls().drop_nans()
    sizes = [abs(value) for value in values if value]
    return min(decimals_for(max(sizes)) + 1, 6) if sizes else 3


def _number(value: float | None, decimals: int) -> str:
    return NOT_MEASURED if value is None else with_unit(value, "", decimals)


def _figure(number: int, column: str, groups: Sequence[Group]) -> Figure | None:
    drawn = [group for group in groups if _is_drawn(group.metrics.get("accuracy", {}))]
    if not drawn:
        return None
    labels = _labels(drawn)
    title = f"Accuracy by {_short(column, LONGEST_LABEL)}"
    marks = [*_marks(labels, drawn, "reference"), *_marks(labels, drawn, "policy")]
    chart = alt.layer(*marks).properties(
        width=palette.WIDTH,
        height=90 + (ROW_HEIGHT + 6) * len(drawn),
        title=alt.TitleParams(text=title, subtitle="ring: before, dot: after, with 95 % intervals"),
    )
    return figure(f"{FIGURE_NAMES}{number}", chart, title, _caption(drawn))


def _is_drawn(accuracy: Mapping[str, Any]) -> bool:
    ends = (accuracy.get(f"{who}{end}") for who in APART for end in ("", "_low", "_high"))
    return all(value is not None and math.isfinite(value) for value in ends)


def _labels(groups: Sequence[Group]) -> list[str]:
    """Return a different label per group: one row of the chart each."""
    labels: list[str] = []
    for group in groups:
        name, few = _short(group.name, LONGEST_LABEL), ", few" if group.is_small else ""
        label, again = f"{name} ({group.pairs:,}{few})", 1
        while label in labels:
            again += 1
            label = f"{name} #{again} ({group.pairs:,}{few})"
        labels.append(label)
    return labels


def _marks(labels: Sequence[str], groups: Sequence[Group], who: str) -> list[Any]:
    """Return the layers of one model: a rule per interval, a ring or a dot per value."""
    accuracies = [group.metrics["accuracy"] for group in groups]
    ends = {
        name: f"{who}{end}" for name, end in (("value", ""), ("low", "_low"), ("high", "_high"))
    }
    frame = pl.DataFrame(
        {"group": labels, **{name: [one[key] for one in accuracies] for name, key in ends.items()}}
    )
    colour = palette.CURVE.light if who == "reference" else palette.CHOSEN.light
    filled = palette.SURFACE.light if who == "reference" else colour
    axis = alt.Axis(
        grid=True,
        labelFlush=False,
        values=[0, 0.25, 0.5, 0.75, 1],
        labelExpr=f"format(100 * datum.value, '.0f') + '{NARROW}%'",
    )
    scale = alt.Scale(domain=[0, 1])
    y, extent = alt.Y("group:N", sort=None).title(None), CHARACTER * max(map(len, labels))
    base = alt.Chart(frame).encode(
        y=y.axis(grid=False, labelColor=palette.INK.light, labelLimit=280, minExtent=round(extent))
    )
    rule = base.mark_rule(color=colour, strokeWidth=2, yOffset=APART[who])
    dot = base.mark_circle(
        fill=filled, stroke=colour, strokeWidth=2, size=60, opacity=1, yOffset=APART[who]
    )
    return [
        rule.encode(x=alt.X("low:Q").title("accuracy").scale(scale).axis(axis), x2="high:Q"),
        dot.encode(x="value:Q"),
    ]


def _caption(groups: Sequence[Group]) -> str:
    """Count clear changes; the interval of a few pairs can exclude zero by accident."""
    counted = [group.metrics["accuracy"] for group in groups if not group.is_small]
    named = "The number of pairs stands behind each name."
    if not counted:
        return f"Every group has fewer than {FEW_PAIRS} pairs, too few for a finding. {named}"
    rose = sum(one["difference_low"] > 0 for one in counted)
    fell = sum(one["difference_high"] < 0 for one in counted)
    return (
        f"Groups with {FEW_PAIRS} pairs or more: {len(counted)}. Accuracy clearly rose in {rose} "
        f"of them and fell in {fell}: the interval of the change excludes zero. {named}"
    )
