"""The tables of a comparison: the same cells for the page, LaTeX, the terminal and Parquet."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from fpo_core.report.comparison import (
    ComparedMetric,
    ComparedRun,
    ComparisonReport,
    ScoreCell,
    ScoreTable,
)
from fpo_core.report.findings import metric_decimals, with_unit
from fpo_core.report.human import NARROW, NOT_MEASURED, decimals_for, number, percent
from fpo_core.report.model import Interval, MetricRow
from fpo_core.report.scores import contest
from fpo_core.report.view import Value, metric_view

PAPER = ("accuracy", "entropy")  # the columns of the paper's Tables 3, 6 and 7
REFERENCE = "reference"
NOTHING = Value("–", "")


class Table(NamedTuple):
    """One table."""

    name: str  # of its files
    title: str
    columns: tuple[str, ...]
    names: int  # leading columns, which name the row
    rows: tuple[tuple[Value, ...], ...]
    note: str
    data: pl.DataFrame  # the same numbers, unrounded


class Cost(NamedTuple):
    """What training a run's policy took; NaN where the log does not say."""

    peak_memory_mb: float  # the largest of all steps, of rank 0
    seconds: float  # a step, median
    tokens_per_second: float  # median


def tables(report: ComparisonReport) -> tuple[Table, ...]:
    """All tables of a comparison, the paper's form first."""
    by_key = {metric.key: metric for metric in report.metrics}
    found = []
    if set(PAPER) & set(by_key):
        found.append(_head_to_head(report, [by_key[key] for key in PAPER if key in by_key]))
    found += [_all_metrics(report), _cost(report)]
    found += [_scores(place, table) for place, table in enumerate(report.scores, 1)]
    return tuple(found)


def differences(report: ComparisonReport) -> tuple[Table, ...]:
    """One table for each two runs: every metric of both and the paired difference."""
    count = len(report.runs)
    pairs = [(run, minus) for minus in range(count) for run in range(minus + 1, count)]
    return tuple(_difference(report, run, minus) for run, minus in pairs)


def accuracy_differences(report: ComparisonReport) -> tuple[Table, ...]:
    """One table of each two runs' difference in accuracy; none where that is not compared."""
    metric = next((m for m in report.metrics if m.key == "accuracy"), None)
    if metric is None:
        return ()
    rows, data = [], []
    for found in metric.differences:
        after, before = report.runs[found.run].name, report.runs[found.minus].name
        row = next(r for r in metric_rows(report, found.run, found.minus) if r.key == metric.key)
        shown = metric_view(row)
        assert shown.difference is not None
        named = Value(f"{after} minus {before}", "")
        rows.append((named, shown.difference, Value(shown.reading, "")))
        data.append({"run": after, "minus": before, **_bounds(found.interval)})
    return (
        Table(
            "accuracy_differences", f"{metric.label}, differences in percentage points",
            ("Runs", "Difference", "Reading"), 1, tuple(rows), _intervals(report),
            pl.DataFrame(data),
        ),
    )  # fmt: skip


def metric_rows(report: ComparisonReport, run: int, minus: int) -> list[MetricRow]:
    """Two runs' metrics as before and after, which is how the report of a run shows them."""
    rows = []
    for metric in report.metrics:
        found = next(d for d in metric.differences if (d.run, d.minus) == (run, minus))
        rows.append(
            MetricRow(
                metric.key, metric.label, metric.description, metric.unit, metric.better,
                metric.runs[minus], metric.runs[run], found.interval,
            )
        )  # fmt: skip
    return rows


def cost_of(run: ComparedRun) -> Cost:
    """What training took, from the log of its steps."""

    def column(name: str) -> pl.Series:
        values = (
            run.training[name] if name in run.training.columns else pl.Series([], dtype=pl.Float64)
        )
        values = values.cast(pl.Float64, strict=False).drop_nulls()
        return values.filter(values.is_finite())

    memory, seconds, rate = map(column, Cost._fields)
    found = (memory.max(), seconds.median(), rate.median())
    return Cost(*(math.nan if one is None else float(one) for one in found))  # pyright: ignore[reportArgumentType]


def _head_to_head(report: ComparisonReport, metrics: Sequence[ComparedMetric]) -> Table:
    """A row a run, named by the settings in which the runs differ."""
    names = report.columns or ("Run",)
    rows, data = [], []
    if all(metric.reference for metric in metrics):
        blanks = [NOTHING] * (len(names) - 1)
        cells = [_shown(metric, metric.reference) for metric in metrics]
        rows.append((Value(REFERENCE, ""), *blanks, *cells))
        data.append({"run": REFERENCE, **_numbers(metrics, [m.reference for m in metrics])})
    for place, run in enumerate(report.runs):
        named = [Value(text, "") for text in (run.settings or (run.name,))]
        rows.append((*named, *(_shown(metric, metric.runs[place]) for metric in metrics)))
        settings = dict(zip(names, run.settings, strict=False))
        data.append(
            {"run": run.name, **settings, **_numbers(metrics, [m.runs[place] for m in metrics])}
        )
    titles = tuple(_titled(metric) for metric in metrics)
    return Table(
        "accuracy_entropy", "Accuracy and entropy", (*names, *titles), len(names), tuple(rows),
        f"On {report.pairs} held-out pairs; entropy of answers sampled to {report.prompts} "
        f"prompts. {_intervals(report)}",
        pl.DataFrame(data, infer_schema_length=None),
    )  # fmt: skip


def _all_metrics(report: ComparisonReport) -> Table:
    """A row a metric, a column a run."""
    rows, data = [], []
    referenced = any(metric.reference for metric in report.metrics)
    for metric in report.metrics:
        cells = [_shown(metric, one) for one in metric.runs]
        if referenced:
            cells.insert(0, _shown(metric, metric.reference))
        rows.append((Value(_titled(metric), ""), *cells))
        named = [(REFERENCE, metric.reference)] if metric.reference else []
        named += [(run.name, metric.runs[place]) for place, run in enumerate(report.runs)]
        data += [
            {"metric": metric.key, "unit": metric.unit, "run": name, **_bounds(one)}
            for name, one in named
        ]
    runs = ((REFERENCE,) if referenced else ()) + tuple(run.name for run in report.runs)
    return Table(
        "metrics", "All metrics", ("Metric", *runs), 1, tuple(rows),
        f"On {report.pairs} held-out pairs and {report.prompts} prompts. {_intervals(report)}",
        pl.DataFrame(data),
    )  # fmt: skip


def _difference(report: ComparisonReport, run: int, minus: int) -> Table:
    after, before = report.runs[run].name, report.runs[minus].name
    rows, data = [], []
    for metric in metric_rows(report, run, minus):
        view = metric_view(metric)
        title = f"{view.label} ({view.unit})" if view.unit else view.label
        assert view.before is not None
        assert view.difference is not None
        assert metric.difference is not None
        reading = Value(view.reading, "")
        rows.append((Value(title, ""), view.before, view.after, view.difference, reading))
        data.append(
            {"metric": metric.key, "unit": metric.unit, "run": after, "minus": before,
             **_bounds(metric.difference)}
        )  # fmt: skip
    return Table(
        f"difference_{minus + 1}_{run + 1}", f"{after} against {before}",
        ("Metric", before, after, "Difference", "Reading"), 1, tuple(rows),
        f"Difference: {after} minus {before} on the same pairs, of shares in percentage points. "
        f"{_intervals(report)}",
        pl.DataFrame(data),
    )  # fmt: skip


def _cost(report: ComparisonReport) -> Table:
    costs = [cost_of(run) for run in report.runs]
    shown = [
        (
            Value(run.name, ""), Value(number(cost.peak_memory_mb / 1000, 2), ""),
            Value(number(cost.seconds), ""), Value(number(cost.tokens_per_second, 0), ""),
            Value(run.machine, ""),
        )
        for run, cost in zip(report.runs, costs, strict=True)
    ]  # fmt: skip
    data = [
        {"run": run.name, "machine": run.machine, "steps": run.training.height, **cost._asdict()}
        for run, cost in zip(report.runs, costs, strict=True)
    ]
    columns = ("Run", "Peak memory (GB)", "Seconds a step", "Tokens a second", "Trained on")
    return Table(
        "cost", "Memory and time", columns, 1, tuple(shown),
        "Peak memory of the first rank, on a GPU what torch allocated, else what was resident; "
        "medians over the steps. Comparable between runs on the same machine, ranks and batches.",
        pl.DataFrame(data),
    )  # fmt: skip


def _scores(place: int, table: ScoreTable) -> Table:
    """A row a run; every figure with the number judged of the number asked."""
    heads = [f"{label} ({unit})" if unit else label for label, unit in table.columns.values()]
    rows, data = [], []
    for row in table.rows:
        cells = [score_value(row.cells.get(name), table.columns[name][1]) for name in table.columns]
        judged = list(dict.fromkeys(f"{c.judged} of {c.asked}" for c in row.cells.values()))
        rows.append((Value(row.run, ""), *cells, Value(", ".join(judged), "")))
        data += [
            {"benchmark": table.benchmark, "opponent": table.opponent, "run": row.run,
             "temperature": table.temperature, "score": name, **vars(cell)}
            for name, cell in row.cells.items()
        ]  # fmt: skip
    at = "" if table.temperature is None else f", temperature {table.temperature:g}"
    note = f"Key of these scores: {key_text(table.key)}."
    return Table(
        f"scores_{place}", f"{contest(table.benchmark, table.opponent)}{at}",
        ("Run", *heads, "Judged of asked"), 1, tuple(rows), note,
        pl.DataFrame(data, infer_schema_length=None),
    )  # fmt: skip


def score_value(cell: ScoreCell | None, unit: str) -> Value:
    """A figure of a benchmark with its interval, as text."""
    if cell is None or cell.value is None:
        return NOTHING
    show = percent if unit == "share" else number
    if cell.low is None or cell.high is None:
        return Value(show(cell.value, 1), "")
    in_percent = unit in ("%", "share")
    decimals = 1 if in_percent else decimals_for(cell.high - cell.low)
    value, low, high = (show(one, decimals) for one in (cell.value, cell.low, cell.high))
    return Value(value, f"{low} to {high}".replace(f"{NARROW}%", ""))


def key_text(key: Mapping[str, Any]) -> str:
    """A score's key in a line."""
    return "; ".join(f"{name}: {_flat(value)}" for name, value in key.items())


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} {_flat(one)}" for name, one in value.items()) + "}"
    return "none" if value is None else str(value)


def _shown(metric: ComparedMetric, interval: Interval | None) -> Value:
    """A value with its interval, with as many decimals as its metric's other values have."""
    if interval is None:
        return NOTHING
    lines = [
        MetricRow(metric.key, "", "", metric.unit, metric.better, None, one, None)
        for one in metric.runs
    ]
    decimals = max(metric_decimals(line) for line in lines)
    value, low, high = (
        with_unit(one, metric.unit, decimals)
        for one in (interval.value, interval.low, interval.high)
    )
    if NOT_MEASURED in (value, low, high):
        return Value(value, "" if value == NOT_MEASURED else "no interval")
    return Value(value, f"{low} to {high}".replace(f"{NARROW}%", ""))


def _titled(metric: ComparedMetric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit not in ("", "share") else metric.label


def _intervals(report: ComparisonReport) -> str:
    return (
        f"Intervals are 95{NARROW}% percentile intervals of a paired bootstrap with "
        f"{report.resamples} resamples, the same draws for all runs."
    )


def _bounds(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _numbers(
    metrics: Sequence[ComparedMetric], intervals: Sequence[Interval | None]
) -> dict[str, float]:
    found = {}
    for metric, interval in zip(metrics, intervals, strict=True):
        if interval is not None:
            found |= {
                metric.key: interval.value,
                f"{metric.key}_low": interval.low,
                f"{metric.key}_high": interval.high,
            }
    return found
