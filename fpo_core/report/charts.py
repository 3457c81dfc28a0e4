"""The charts of a report, drawn by Altair and turned into SVG and PNG by vl-convert: no browser.

What cannot be drawn is left out and said so in a sentence, never drawn empty.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import altair as alt
import polars as pl
import vl_convert as vlc

from fpo_core.report import palette
from fpo_core.report.human import NARROW, number, percent, printable
from fpo_core.report.model import FeatureShift, RunReport, Side
from fpo_core.report.series import Series, read_series, thin

PNG_SCALE = 2
CURVE_HEIGHT, ROW_HEIGHT, LINE_HEIGHT = 280, 26, 16
STEP_TICKS = 6
AROUND = 95  # pixels of a chart's height that title and axis take
# What layering is typed to return; only layers are made here.
Chart = alt.LayerChart | alt.FacetChart
SIDES: tuple[Side, ...] = ("chosen", "rejected")
SIDE_COLOURS = {"chosen": palette.CHOSEN.light, "rejected": palette.REJECTED.light}
CHART_NAMES = (
    "loss", "accuracy", "margin", "discrepancy", "features_chosen", "features_rejected",
    "heldout_accuracy", "heldout_kl", "heldout_fvu",
)  # fmt: skip


class Curve(NamedTuple):
    """How one column of the training log is drawn."""

    column: str
    title: str
    subtitle: str
    shares: bool = False
    level: float | None = None  # a horizontal line to read the curve against
    level_name: str = ""


@dataclass(frozen=True)
class Figure:
    """One chart, ready for the page."""

    name: str  # of its PNG
    svg: str
    png: bytes
    label: str  # what it shows, for people who cannot see it
    caption: str


@dataclass(frozen=True)
class Drawn:
    """The charts that could be drawn, and sentences on those that could not."""

    curves: tuple[Figure, ...]
    features: tuple[Figure, ...]
    omitted: tuple[str, ...]
    reading: str  # how to read the curves; empty where there are none


CURVES = (
    Curve("loss", "Loss", "mean over the pairs of a step"),
    Curve(
        "accuracy", "Reward accuracy", "share of a step's pairs where the chosen answer gains more",
        shares=True, level=0.5, level_name="chance",
    ),
    Curve("margin", "Implicit reward margin", "chosen minus rejected", level=0.0),
)  # fmt: skip


def draw(report: RunReport) -> Drawn:
    """All charts of a report."""
    curves: list[Figure] = []
    omitted: list[str] = []
    read: list[Series] = []
    for curve in CURVES:
        series = read_series(report.training, curve.column)
        if series is None:
            omitted.append(_omission(curve.title, [curve.column]))
            continue
        if curve.column == "loss" and report.method.lower() in ("fpo", "dpo"):
            # The policy starts as the reference: u = 0 and the loss is log 2.
            curve = curve._replace(level=math.log(2), level_name="log 2, where it starts")
        read.append(series)
        chart = layers(curve, {curve.title: series}, {curve.title: palette.CURVE.light})
        curves.append(figure(curve.column, chart, curve.title, _curve_caption(curve, series)))
    sides = {side: read_series(report.training, f"discrepancy_{side}") for side in SIDES}
    found = {side: series for side, series in sides.items() if series is not None}
    if found:
        curves.append(_discrepancy_figure(found))
    missing = [f"discrepancy_{side}" for side in SIDES if side not in found]
    if missing:
        omitted.append(_omission("Feature discrepancy", missing, partly=bool(found)))
    reading = _reading([*read, *found.values()])
    return Drawn(tuple(curves), _feature_figures(report.features), tuple(omitted), reading)


def _omission(title: str, columns: Sequence[str], *, partly: bool = False) -> str:
    names = " and ".join(columns)
    what = "is shown in part" if partly else "is left out"
    return f"{title} {what}: this run's training log has no values for {names}."


def _discrepancy_figure(found: dict[str, Series]) -> Figure:
    curve = Curve("discrepancy", "Feature discrepancy", "distance of SAE features to the reference")
    ends = [
        f"from {_plain(series.first)} to {_plain(series.last)} on {side} answers"
        for side, series in found.items()
    ]
    skipped = max(found.values(), key=lambda series: series.skipped)
    caption = f"First step to last tenth: {', '.join(ends)}.{_skipped(skipped)}"
    chart = layers(curve, found, SIDE_COLOURS, named=True)
    return figure("discrepancy", chart, curve.title, caption)


def _step_axis(series: dict[str, Series]) -> alt.Axis:
    """Whole steps only: of a short run Vega would mark halves, and round their labels twice."""
    steps = pl.concat([one.frame["step"].cast(pl.Int64) for one in series.values()]).to_list()
    first, last = min(steps), max(steps)
    if last - first <= STEP_TICKS:
        return alt.Axis(
            grid=False, format=",d", labelFlush=False, values=list(range(first, last + 1))
        )
    return alt.Axis(grid=False, format=",d", labelFlush=False, tickCount=STEP_TICKS, tickMinStep=1)


def layers(
    curve: Curve, series: dict[str, Series], colours: dict[str, str], *, named: bool = False
) -> Chart:
    """A chart of lines over steps, each in its colour and, where ``named``, with its name."""
    x = alt.X("step:Q").title("step").axis(_step_axis(series))
    domain = alt.Scale(domain=[0, 1]) if curve.shares else alt.Scale(zero=False, nice=True)
    # The page writes a narrow space before a percent sign; d3's own format has none.
    shares = f"format(100 * datum.value, '.0f') + '{NARROW}%'"
    axis = alt.Axis(labelExpr=shares) if curve.shares else alt.Axis(format="~r", tickCount=5)
    layers: list[Any] = []
    for name, one in series.items():
        points = thin(one.frame)
        base = alt.Chart(points).encode(x=x)
        smoothed = one.half_life is not None
        raw = base.mark_line(
            color=colours[name], strokeWidth=1, opacity=0.35 if smoothed else 1, point=False
        ).encode(y=alt.Y("value:Q").title(None).scale(domain).axis(axis))
        layers.append(raw)
        if smoothed:
            line = base.mark_line(color=colours[name], strokeWidth=2.5, strokeCap="round")
            layers.append(line.encode(y="smooth:Q"))
        else:
            layers.append(base.mark_circle(color=colours[name], opacity=1).encode(y="value:Q"))
    if curve.level is not None:
        layers += _level(curve, max(float(s.frame["step"].to_numpy()[0]) for s in series.values()))
    if named:
        layers += _end_names(series, colours)
    return alt.layer(*layers).properties(
        width=palette.WIDTH, height=CURVE_HEIGHT, title=_title(curve.title, curve.subtitle)
    )


def _level(curve: Curve, start: float) -> list[Any]:
    base = alt.Chart(pl.DataFrame({"step": [start], "value": [curve.level]}))
    rule = base.mark_rule(color=palette.MUTED.light, strokeDash=[3, 4]).encode(y="value:Q")
    if not curve.level_name:
        return [rule]
    text = base.mark_text(
        text=curve.level_name, align="right", baseline="bottom", dy=-3,
        color=palette.MUTED.light, fontSize=11,
    ).encode(x=alt.value(alt.ExprRef("width")), y="value:Q")  # fmt: skip
    return [rule, text]


def _end_names(series: dict[str, Series], colours: dict[str, str]) -> list[Any]:
    """Each line's name at its right end, moved apart where the lines end close together."""
    values = [s.frame["value"].to_numpy() for s in series.values()]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    ends = {name: float(one.frame["smooth"][-1]) for name, one in series.items()}
    heights = {name: (high - end) / ((high - low) or 1) for name, end in ends.items()}
    shifts = apart({name: (CURVE_HEIGHT - AROUND) * height for name, height in heights.items()})
    layers = []
    for name, one in series.items():
        text = alt.Chart(one.frame.tail(1)).mark_text(
            text=name, align="left", dx=8, dy=shifts[name], color=colours[name], fontSize=12,
            fontWeight=600,
        )  # fmt: skip
        layers.append(text.encode(x="step:Q", y="smooth:Q"))
    return layers


def apart(places: dict[str, float]) -> dict[str, float]:
    """By how much to move each name down so that no two are closer than a line of text.

    Args:
        places: where each name would stand, in pixels from the top.
    """
    # Names that are too close become one block, centred where they would have stood.
    blocks: list[tuple[list[str], float]] = []  # names from the top, the middle of their block
    for name in sorted(places, key=lambda name: places[name]):
        blocks.append(([name], places[name]))
        while len(blocks) > 1:
            (upper, above), (lower, below) = blocks[-2:]
            if below - above >= LINE_HEIGHT * (len(upper) + len(lower)) / 2:
                break
            names = [*upper, *lower]
            blocks[-2:] = [(names, sum(places[one] for one in names) / len(names))]
    return {
        name: middle + LINE_HEIGHT * (place - (len(names) - 1) / 2) - places[name]
        for names, middle in blocks
        for place, name in enumerate(names)
    }


def _feature_figures(features: Sequence[FeatureShift]) -> tuple[Figure, ...]:
    drawn = [f for f in features if math.isfinite(f.reference) and math.isfinite(f.policy)]
    if not drawn:
        return ()
    # One scale for both sides: their lengths are meant to be compared.
    values = [value for f in drawn for value in (f.reference, f.policy)]
    scale = alt.Scale(domain=[min(0.0, *values), max(values) or 1.0], nice=True)
    figures = []
    for side in SIDES:
        rows = [f for f in drawn if f.side == side]
        if rows:
            rows.sort(key=lambda f: -abs(f.policy - f.reference))
            figures.append(_feature_figure(side, rows, scale))
    return tuple(figures)


def _feature_figure(side: Side, rows: Sequence[FeatureShift], scale: alt.Scale) -> Figure:
    frame = pl.DataFrame(
        {
            "feature": [f"#{f.feature}" for f in rows],
            "before": [f.reference for f in rows],
            "after": [f.policy for f in rows],
        }
    )
    colour = SIDE_COLOURS[side]
    y = alt.Y("feature:N", sort=None).title(None).axis(grid=True, labelColor=palette.INK.light)
    axis = alt.Axis(grid=False, labelFlush=False, tickCount=5)
    x = alt.X("before:Q").title("mean pooled activation").scale(scale).axis(axis)
    base = alt.Chart(frame).encode(y=y)
    dots = {"size": 70, "opacity": 1, "strokeWidth": 2, "stroke": colour}
    chart = alt.layer(
        base.mark_rule(color=colour, strokeWidth=2).encode(x=x, x2="after:Q"),
        base.mark_circle(fill=palette.SURFACE.light, **dots).encode(x=x),
        base.mark_circle(fill=colour, **dots).encode(x="after:Q"),
    ).properties(
        width=palette.WIDTH,
        height=90 + ROW_HEIGHT * len(rows),
        title=_title(f"On {side} answers", "ring: before, dot: after"),
    )
    rising = sum(f.policy > f.reference for f in rows)
    caption = (
        f"{rising} of these {len(rows)} features became more active, "
        f"{sum(f.policy < f.reference for f in rows)} less."
    )
    return figure(f"features_{side}", chart, f"Features that moved most on {side}", caption)


def _curve_caption(curve: Curve, series: Series) -> str:
    show = percent if curve.shares else _plain
    ends = f"{show(series.first)} at the first step, {show(series.last)} over the last tenth."
    return ends + _skipped(series)


def _skipped(series: Series) -> str:
    if not series.skipped:
        return ""
    steps = "1 step has" if series.skipped == 1 else f"{series.skipped} steps have"
    return f" {steps} no finite value and are not drawn."


def _reading(series: Sequence[Series]) -> str:
    if not series:
        return ""
    longest = max(series, key=lambda one: one.frame.height)
    if longest.half_life is None:
        return "Every step is drawn as it was logged: there are too few to smooth."
    return (
        f"Faint lines are single steps; the strong line is their exponential mean with a half-life "
        f"of {longest.half_life} steps, looking back only."
    )


def _plain(value: float) -> str:
    return number(value)


def _title(title: str, subtitle: str) -> alt.TitleParams:
    return alt.TitleParams(text=title, subtitle=subtitle)


def figure(name: str, chart: Chart, title: str, caption: str) -> Figure:
    """A chart drawn, with its caption."""
    spec = _drawable(chart.to_dict())  # a control character in it ends the process
    spec |= {
        "autosize": {"type": "fit", "contains": "padding"},
        "background": palette.SURFACE.light,
        "padding": 8,
        "config": palette.chart_config(),
    }
    # All data is in the specification: nothing may be fetched while drawing.
    svg = vlc.vegalite_to_svg(spec, allowed_base_urls=[])
    png = vlc.svg_to_png(svg, scale=PNG_SCALE)
    label = f"Chart: {title}. {caption}".replace(NARROW, " ")
    return Figure(name, _inline(svg, name), png, label, caption)


def _drawable(value: Any) -> Any:
    """A specification whose every text can be part of a drawing."""
    if isinstance(value, dict):
        return {printable(name): _drawable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_drawable(inner) for inner in value]
    return printable(value) if isinstance(value, str) else value


def _inline(svg: str, name: str) -> str:
    """The drawing as part of a page: it scales, is one image, and its ids are its own."""
    # Vega counts clip paths from 0 in each drawing; in one page the ids would collide.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    svg = re.sub(r' xmlns:xlink="[^"]*"| role="[^"]*"| aria-[a-z]+="[^"]*"', "", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 aria-hidden="true"', svg, count=1
    )
