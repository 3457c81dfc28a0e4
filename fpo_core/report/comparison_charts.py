"""The figures of a comparison: one chart a quantity, a colour and a name a run.

Runs with long names are called by letters, which the line under the title explains, so that a
chart taken out of the page still says which run is which.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import altair as alt
import polars as pl

from fpo_core.report import palette
from fpo_core.report.charts import (
    AROUND,
    CURVE_HEIGHT,
    LINE_HEIGHT,
    SIDES,
    Chart,
    Curve,
    Figure,
    apart,
    figure,
    layers,
)
from fpo_core.report.comparison import ComparedRun, ComparisonReport
from fpo_core.report.comparison_tables import REFERENCE, Cost, cost_of
from fpo_core.report.findings import with_unit
from fpo_core.report.heldout import every_point
from fpo_core.report.human import NARROW, number, percent
from fpo_core.report.scores import contest
from fpo_core.report.series import Series, read_series

LONGEST_NAME, MOST_NAMED = 18, 8  # beyond them runs are called by letters
PARTS = (*SIDES, "margin")
PLANE_HEIGHT, BAR_HEIGHT, BAR_LABELS = 340, 34, 90
DODGE = 0.015  # of the range of temperatures, between two runs
NEAR, ABOVE = 0.2, 9  # share of the width within which names collide; pixels above their point
KL = {
    part: Curve(f"kl_{part}", f"KL to the reference, {part}", "nats an answer, on held-out pairs")
    for part in SIDES
} | {
    "margin": Curve(
        "kl_margin", "KL to the reference, margin", "rejected minus chosen, on held-out pairs"
    )
}
DISCREPANCY = {
    part: Curve(
        f"discrepancy_{part}", f"Feature discrepancy, {part}",
        "rejected minus chosen, on training batches" if part == "margin" else
        "distance of SAE features to the reference, on training batches",
    )
    for part in PARTS
}  # fmt: skip
COSTS: dict[str, tuple[str, str, Callable[[float], str], float]] = {
    "peak_memory_mb": ("Peak memory", "GB, first rank", lambda v: number(v, 2), 1e-3),
    "seconds": ("Time of a step", "seconds, median", number, 1.0),
    "tokens_per_second": ("Throughput", "tokens a second, median", lambda v: number(v, 0), 1.0),
}


class Drawing(NamedTuple):
    """A figure and the numbers in it."""

    figure: Figure
    data: pl.DataFrame


class Drawn(NamedTuple):
    """The figures, by the part of the page that they are in, and what could not be drawn."""

    plane: tuple[Drawing, ...]
    kl: tuple[Drawing, ...]
    discrepancy: tuple[Drawing, ...]
    cost: tuple[Drawing, ...]
    rates: tuple[Drawing, ...]
    notes: dict[str, tuple[str, ...]]  # by the same parts

    def every(self) -> list[Drawing]:
        """All figures."""
        return [*self.plane, *self.kl, *self.discrepancy, *self.cost, *self.rates]


def draw(report: ComparisonReport) -> Drawn:
    """All figures of a comparison."""
    style = Style([run.name for run in report.runs])
    plane, why_no_plane = _plane(report, style)
    kl, kl_notes = _curves(report, style, "kl", KL, _measured_kl)
    found, notes = _curves(report, style, "discrepancy", DISCREPANCY, _logged_discrepancy)
    return Drawn(
        plane, kl, found, _costs(report, style), _rates(report, style),
        {"plane": why_no_plane, "kl": kl_notes, "discrepancy": notes},
    )  # fmt: skip


class Style:
    """How charts call and colour the runs.

    Args:
        names: of all runs, in their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        short = len(names) <= MOST_NAMED and max(map(len, names)) <= LONGEST_NAME
        letters = [
            letter if number == 0 else f"{letter}{number}"
            for number in range(len(names) // 26 + 1)
            for letter in string.ascii_uppercase
        ]
        self.tags = {name: name if short else letters[n] for n, name in enumerate(names)}
        tones = [palette.RUNS[n % len(palette.RUNS)] for n in range(len(names))]
        self.colours = {name: tone.light for name, tone in zip(names, tones, strict=True)}
        self._short = short
        # A chart grows by its legend, so that what is drawn stays as high.
        self.legend = 0 if short else LINE_HEIGHT * len(names)

    def title(self, title: str, subtitle: str, shown: Sequence[str]) -> alt.TitleParams:
        """A chart's title; where runs are called by letters, with a line for each."""
        legend = [] if self._short else [f"{self.tags[name]}: {name}" for name in shown]
        return alt.TitleParams(text=title, subtitle=[subtitle, *legend])


def _measured_kl(run: ComparedRun, part: str) -> Series | None:
    """KL on held-out pairs: training itself only has it under objectives that compute it."""
    return every_point(read_series(_with_margin(run.heldout, "kl"), f"kl_{part}"))


def _logged_discrepancy(run: ComparedRun, part: str) -> Series | None:
    return read_series(_with_margin(run.training, "discrepancy"), f"discrepancy_{part}")


def _with_margin(frame: pl.DataFrame, quantity: str) -> pl.DataFrame:
    chosen, rejected, margin = (f"{quantity}_{part}" for part in PARTS)
    if margin in frame.columns or not {chosen, rejected} <= set(frame.columns):
        return frame
    return frame.with_columns((pl.col(rejected) - pl.col(chosen)).alias(margin))


def _curves(
    report: ComparisonReport,
    style: Style,
    quantity: str,
    curves: dict[str, Curve],
    read: Callable[[ComparedRun, str], Series | None],
) -> tuple[tuple[Drawing, ...], tuple[str, ...]]:
    """A chart for chosen, rejected and margin, each with every run that has the quantity."""
    title = next(iter(curves.values())).title.partition(",")[0]
    if quantity in report.no_curves:
        return (), (f"{title} over the steps is left out: {report.no_curves[quantity]}.",)
    drawn = []
    for part, curve in curves.items():
        found = {run.name: series for run in report.runs if (series := read(run, part))}
        if found:
            drawn.append(_curve(style, curve, found))
    lacking = [run.name for run in report.runs if read(run, PARTS[0]) is None]
    if not lacking:
        return tuple(drawn), ()
    where = (
        "their training was not measured on held-out pairs (monitor.heldout_steps was 0)"
        if quantity == "kl"
        else "their training log has no feature discrepancy"
    )
    return tuple(drawn), (f"{title} over the steps is without {', '.join(lacking)}: {where}.",)


def _curve(style: Style, curve: Curve, found: dict[str, Series]) -> Drawing:
    tagged = {style.tags[name]: series for name, series in found.items()}
    colours = {style.tags[name]: style.colours[name] for name in found}
    chart = layers(curve, tagged, colours, named=True)
    chart = chart.properties(
        height=CURVE_HEIGHT + style.legend,
        title=style.title(curve.title, curve.subtitle, list(found)),
    )
    ends = [f"{name} {number(series.last)}" for name, series in found.items()]
    data = pl.concat(
        series.frame.select(pl.lit(name).alias("run"), "step", "value", "smooth")
        for name, series in found.items()
    )
    return Drawing(
        figure(curve.column, chart, curve.title, f"At the end: {', '.join(ends)}."), data
    )


def _plane(report: ComparisonReport, style: Style) -> tuple[tuple[Drawing, ...], tuple[str, ...]]:
    """Accuracy against the entropy of sampled answers, both with their intervals."""
    by_key = {metric.key: metric for metric in report.metrics}
    missing = [name for name in ("accuracy", "entropy") if name not in by_key]
    if missing:
        return (), (f"The plane is left out: {' and '.join(missing)} cannot be compared.",)
    accuracy, entropy = by_key["accuracy"], by_key["entropy"]
    points = [
        (run.name, style.tags[run.name], style.colours[run.name], accuracy.runs[n], entropy.runs[n])
        for n, run in enumerate(report.runs)
    ]
    if accuracy.reference and entropy.reference:
        ink = palette.MUTED.light
        points.append((REFERENCE, REFERENCE, ink, accuracy.reference, entropy.reference))
    data = pl.DataFrame(
        [
            {"run": name, "accuracy": x.value, "accuracy_low": x.low, "accuracy_high": x.high,
             "entropy": y.value, "entropy_low": y.low, "entropy_high": y.high}
            for name, _, _, x, y in points
        ]
    )  # fmt: skip
    shifts = _label_shifts(data, [tag for _, tag, _, _, _ in points])
    shares = f"format(100 * datum.value, '.0f') + '{NARROW}%'"
    scale = alt.Scale(zero=False, nice=True, padding=12)
    across = alt.X("accuracy:Q").title("accuracy").scale(scale)
    across = across.axis(alt.Axis(grid=True, labelExpr=shares, tickCount=5, labelFlush=False))
    up = alt.Y("entropy:Q").title("entropy of sampled answers, nats").scale(scale)
    up = up.axis(alt.Axis(tickCount=5))
    halo = palette.SURFACE.light  # keeps names readable where lines cross them
    drawn: list[Any] = []
    names: list[Any] = []
    for row, (_, tag, colour, _, _) in enumerate(points):
        base = alt.Chart(data[row : row + 1]).encode(x=across, y=up)
        line = {"color": colour, "strokeWidth": 1.5, "opacity": 0.7}
        drawn += [
            base.mark_rule(**line).encode(x="accuracy_low:Q", x2="accuracy_high:Q"),
            base.mark_rule(**line).encode(y="entropy_low:Q", y2="entropy_high:Q"),
            base.mark_circle(color=colour, size=80, opacity=1),
        ]
        name: dict[str, Any] = {
            "text": tag, "align": "left", "dx": 8, "dy": shifts[tag], "fontSize": 12,
            "fontWeight": 600,
        }  # fmt: skip
        names.append(base.mark_text(**name, color=halo, stroke=halo, strokeWidth=4))
        names.append(base.mark_text(**name, color=colour))
    title = "Accuracy and entropy"
    every = [run.name for run in report.runs]
    chart = alt.layer(*drawn, *names).properties(
        width=palette.WIDTH, height=PLANE_HEIGHT + style.legend,
        title=style.title(title, f"lines: 95{NARROW}% intervals", every),
    )  # fmt: skip
    said = [
        f"{name} {percent(x.value)} and {with_unit(y.value, 'nats', 3)} nats"
        for name, _, _, x, y in points
    ]
    caption = f"Accuracy by average log-prob, and entropy: {'; '.join(said)}."
    return (Drawing(figure("accuracy_entropy", chart, title, caption), data),), ()


def _label_shifts(points: pl.DataFrame, tags: Sequence[str]) -> dict[str, float]:
    """By how much to move each point's name, so that names of near points do not overlap."""
    low, high = points["entropy_low"].min(), points["entropy_high"].max()
    left, right = points["accuracy_low"].min(), points["accuracy_high"].max()
    down = (PLANE_HEIGHT - AROUND) / ((high - low) or 1)  # pyright: ignore[reportOperatorIssue]
    near = NEAR * ((right - left) or 1)  # pyright: ignore[reportOperatorIssue]
    placed = sorted(zip(points["accuracy"], points["entropy"], tags, strict=True))
    columns: list[dict[str, float]] = []
    before = -math.inf
    for accuracy, entropy, tag in placed:
        if accuracy - before > near:
            columns.append({})
        columns[-1][tag] = down * (high - entropy)  # pyright: ignore[reportOperatorIssue]
        before = accuracy
    shifts = {tag: shift for column in columns for tag, shift in apart(column).items()}
    return {tag: shift - ABOVE for tag, shift in shifts.items()}


def _costs(report: ComparisonReport, style: Style) -> tuple[Drawing, ...]:
    costs = {run.name: cost_of(run) for run in report.runs}
    drawn = [_bars(style, quantity, costs) for quantity in COSTS]
    return tuple(one for one in drawn if one is not None)


def _bars(style: Style, quantity: str, costs: dict[str, Cost]) -> Drawing | None:
    """One quantity as a bar a run, with its value at the bar's end."""
    title, subtitle, show, factor = COSTS[quantity]
    values = {name: factor * getattr(cost, quantity) for name, cost in costs.items()}
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    data = pl.DataFrame(
        {
            "run": list(values), "value": list(values.values()),
            "tag": [style.tags[name] for name in values],
            "shown": [show(value) for value in values.values()],
        }
    )  # fmt: skip
    y = alt.Y("tag:N", sort=None).title(None)
    y = y.axis(alt.Axis(labelColor=palette.INK.light, labelLimit=180))
    # Room at the right for the value of the longest bar.
    scale = alt.Scale(
        domain=[0, max(values.values()) * palette.WIDTH / (palette.WIDTH - BAR_LABELS)]
    )
    x = alt.X("value:Q").title(None).scale(scale).axis(None)
    drawn: list[Any] = []
    for row, name in enumerate(values):
        base = alt.Chart(data[row : row + 1]).encode(x=x, y=y)
        drawn.append(base.mark_bar(color=style.colours[name], height=16))
        text = base.mark_text(align="left", dx=6, color=palette.INK.light, fontSize=12)
        drawn.append(text.encode(text="shown:N"))
    chart = alt.layer(*drawn).properties(
        width=palette.WIDTH, height=60 + style.legend + BAR_HEIGHT * len(values),
        title=style.title(title, subtitle, list(values)),
    )  # fmt: skip
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    caption = f"From {show(values[low])} ({low}) to {show(values[high])} ({high})."
    if len(values) == 1:
        caption = f"{low}: {show(values[low])}."
    return Drawing(figure(f"cost_{quantity}", chart, title, caption), data.drop("tag", "shown"))


def _rates(report: ComparisonReport, style: Style) -> tuple[Drawing, ...]:
    if report.rates.is_empty():
        return ()
    groups = report.rates.partition_by(
        "benchmark", "opponent", "key", "score", maintain_order=True
    )  # fmt: skip
    return tuple(_rate(style, place, group) for place, group in enumerate(groups, 1))


def _rate(style: Style, place: int, group: pl.DataFrame) -> Drawing:
    """A line a run over the temperatures, with intervals where there are some."""
    benchmark, opponent, score = (group[name][0] for name in ("benchmark", "opponent", "score"))
    runs = group["run"].unique(maintain_order=True).to_list()
    ends = {
        style.tags[run]: group.filter(pl.col("run") == run).sort("temperature")[-1] for run in runs
    }
    values = pl.concat([group[name].drop_nulls() for name in ("value", "low", "high")])
    low, high = float(values.min() or 0), float(values.max() or 0)  # pyright: ignore[reportArgumentType]
    span = (high - low) or 1
    shifts = apart(
        {
            tag: (CURVE_HEIGHT - AROUND) * (high - end["value"][0]) / span
            for tag, end in ends.items()
        }
    )
    temperatures = group["temperature"].unique().sort().to_list()
    axis = alt.Axis(grid=False, values=temperatures, format="~g", labelFlush=False)
    x = alt.X("at:Q").title("temperature of the answers").axis(axis)
    x = x.scale(alt.Scale(zero=False, nice=False, padding=10))
    step = DODGE * (temperatures[-1] - temperatures[0])
    y = alt.Y("value:Q").title(None).scale(alt.Scale(zero=False, nice=True))
    drawn: list[Any] = []
    for run in runs:
        colour, tag = style.colours[run], style.tags[run]
        # Side by side: intervals at one temperature would hide each other.
        at = pl.col("temperature") + step * (runs.index(run) - (len(runs) - 1) / 2)
        mine = group.filter(pl.col("run") == run).with_columns(at.alias("at")).sort("at")
        base = alt.Chart(mine).encode(x=x, y=y)
        drawn += [
            base.mark_line(color=colour, strokeWidth=2),
            base.mark_circle(color=colour, size=50, opacity=1),
            base.mark_rule(color=colour, strokeWidth=1.5, opacity=0.7).encode(
                y="low:Q", y2="high:Q"
            ),
            alt.Chart(mine[-1]).mark_text(
                text=tag, align="left", dx=8, dy=shifts[tag], color=colour, fontSize=12,
                fontWeight=600,
            ).encode(x="at:Q", y="value:Q"),
        ]  # fmt: skip
    title = "Win rate by temperature"
    chart: Chart = alt.layer(*drawn).properties(
        width=palette.WIDTH, height=CURVE_HEIGHT + style.legend,
        title=style.title(title, f"{score}, {contest(benchmark, opponent)}", runs),
    )  # fmt: skip
    judged = [f"{row['judged']} of {row['asked']}" for row in group.to_dicts()]
    caption = f"Judged of asked: {', '.join(dict.fromkeys(judged))}. Runs are drawn side by side."
    return Drawing(figure(f"win_rate_{place}", chart, title, caption), group)
