"""A report's values turned into the words and numbers that the template prints."""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from fpo_core.report import human
from fpo_core.report.findings import (
    Verdict,
    excludes_zero,
    is_measured,
    metric_decimals,
    verdict,
    with_unit,
)
from fpo_core.report.model import FeatureShift, GroupShift, Interval, MetricRow, RunReport, StageRow

OPEN_SAMPLES = 12
STOPS = {"end of turn": "ended by itself", "length": "cut off at the length limit"}
DIRECTIONS = {
    "higher": "higher is better",
    "lower": "lower is better",
    "neither": "neither direction is better",
}
# A filled mark: the interval excludes zero. Shape and word say it, so colour is only an addition.
MARKS: dict[Verdict, tuple[str, str]] = {
    "better": ("●", "better"),
    "worse": ("●", "worse"),
    "changed": ("●", "changed"),
    "unclear": ("○", "no clear change"),
    "unmeasured": ("", human.NOT_MEASURED),
    "no comparison": ("", "not compared"),
}
VISIBLE_SPACE = str.maketrans({" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"})
SHORT_DIGEST = 12


class Value(NamedTuple):
    """A value and its interval, as text."""

    value: str
    interval: str


class Whisker(NamedTuple):
    """A difference's interval drawn on a line, in percent of its width; zero is at 50."""

    low: float
    value: float
    high: float


class MetricView(NamedTuple):
    """A line of the before/after table."""

    label: str
    description: str
    unit: str
    direction: str
    before: Value | None
    after: Value
    difference: Value | None
    whisker: Whisker | None
    verdict: str
    mark: str
    reading: str


class FeatureView(NamedTuple):
    """A line of the table of features, or of their groups."""

    name: str
    side: str
    before: str
    after: str
    change: str
    interval: str
    effect: str
    tokens: tuple[str, ...] = ()


class InputView(NamedTuple):
    """One input of a stage: a link to the stage that made it, or a digest."""

    name: str
    stage: str | None
    digest: str


class StageView(NamedTuple):
    """A line of what ran."""

    stage: str
    artifact: str
    state: str
    rows: str
    size: str
    seconds: str
    inputs: tuple[InputView, ...]


def metric_view(metric: MetricRow) -> MetricView:
    """One line of the before/after table."""
    found = verdict(metric)
    mark, reading = MARKS[found]
    decimals = metric_decimals(metric)

    def show(interval: Interval | None, *, difference: bool = False) -> Value | None:
        if interval is None:
            return None
        value, low, high = (
            with_unit(one, metric.unit, decimals, difference=difference)
            for one in (interval.value, interval.low, interval.high)
        )
        if value == human.NOT_MEASURED:
            return Value(value, "")
        if human.NOT_MEASURED in (low, high):
            return Value(value, "no interval")
        # The value above carries the percent sign: three in a cell would be noise.
        return Value(value, f"{low} to {high}".replace(f"{human.NARROW}%", ""))

    after = show(metric.policy)
    assert after is not None
    return MetricView(
        metric.label, metric.description, "" if metric.unit == "share" else metric.unit,
        DIRECTIONS[metric.better], show(metric.reference), after,
        show(metric.difference, difference=True), _whisker(metric.difference), found, mark, reading,
    )  # fmt: skip


def _whisker(difference: Interval | None) -> Whisker | None:
    if difference is None:
        return None
    ends = (difference.low, difference.value, difference.high)
    reach = max(map(abs, ends))
    if reach == 0 or not all(map(math.isfinite, ends)):
        return None
    return Whisker(*(round(50 + 46 * end / reach, 2) for end in ends))


def clear_changes(report: RunReport) -> tuple[int, int]:
    """How many differences exclude zero, of how many there are."""
    found = [m.difference for m in report.metrics if m.difference and is_measured(m.difference)]
    return sum(map(excludes_zero, found)), len(found)


def feature_views(shifts: tuple[FeatureShift, ...]) -> tuple[FeatureView, ...]:
    """The table of features."""
    return tuple(
        line._replace(tokens=tuple(one.translate(VISIBLE_SPACE) or "∅" for one in shift.tokens))
        for shift, line in zip(
            shifts, _shift_lines(shifts, [f"#{one.feature}" for one in shifts]), strict=True
        )
    )


def group_views(shifts: tuple[GroupShift, ...]) -> tuple[FeatureView, ...]:
    """The table of groups."""
    return _shift_lines(shifts, [f"{one.group} ({one.size} features)" for one in shifts])


def _shift_lines(
    shifts: Sequence[FeatureShift | GroupShift], names: Sequence[str]
) -> tuple[FeatureView, ...]:
    """All rows have the decimals that suit the largest change."""
    changes = [abs(shift.policy - shift.reference) for shift in shifts]
    decimals = human.decimals_for(max((c for c in changes if math.isfinite(c)), default=0)) + 1

    def show(value: float, *, sign: bool = False) -> str:
        return human.number(value, decimals, sign=sign)

    return tuple(
        FeatureView(
            name, shift.side, show(shift.reference), show(shift.policy),
            show(shift.policy - shift.reference, sign=True),
            f"{show(shift.low, sign=True)} to {show(shift.high, sign=True)}",
            human.number(shift.effect, 2, sign=True),
        )
        for name, shift in zip(names, shifts, strict=True)
    )  # fmt: skip


def stage_views(stages: tuple[StageRow, ...]) -> tuple[StageView, ...]:
    """What ran; an input that is another stage's artifact names that stage."""
    made_by = {row.version.rpartition("/")[2]: row.stage for row in stages}
    return tuple(
        StageView(
            row.stage, row.version, row.state, human.count(row.rows), human.size(row.bytes),
            human.duration(row.seconds),
            tuple(
                InputView(name, made_by.get(version.rpartition("/")[2]), _short(version))
                for name, version in row.inputs.items()
            ),
        )
        for row in stages
    )  # fmt: skip


def _short(version: str) -> str:
    """A long digest cut to what tells it from others; everything else as it is."""
    kind, slash, digest = version.rpartition("/")
    if re.fullmatch(r"(?:\w+:)?[0-9a-f]{16,}", digest):
        prefix, colon, bare = digest.rpartition(":")
        digest = f"{prefix}{colon}{bare[:SHORT_DIGEST]}…"
    return f"{kind}{slash}{digest}"


def created_text(created: str) -> str:
    """A date as people write it."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {when.tzname()}" if when.tzname() else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"


def training_facts(report: RunReport) -> list[tuple[str, str]]:
    """Figures of the training run that need no chart."""
    log = report.training
    facts = [("steps", human.count(log.height))] if log.height else []
    columns = {name: log[name].cast(float, strict=False).drop_nulls() for name in log.columns}
    columns = {name: c.filter(c.is_finite()) for name, c in columns.items()}

    def add(label: str, column: str, show) -> None:
        values = columns.get(column)
        if values is not None and len(values):
            facts.append((label, show(values)))

    add("time in steps", "seconds", lambda c: human.duration(c.sum()))
    add("tokens a second, median", "tokens_per_second", lambda c: f"{c.median():,.0f}")
    add("learning rate at the end", "lr", lambda c: human.number(c[-1]))
    add(
        "gradient norm, median (largest)", "grad_norm",
        lambda c: f"{human.number(c.median())} ({human.number(c.max())})",
    )  # fmt: skip
    return facts


def totals(stages: tuple[StageRow, ...]) -> str:
    """One sentence on what this run spent and stored."""
    spent = [row for row in stages if row.state != "reused"]
    reused = len(stages) - len(spent)
    seconds = human.duration(sum(row.seconds for row in spent))
    text = f"{len(spent)} of {len(stages)} stages ran, in {seconds}."
    if reused:
        text += f" {reused} {'was' if reused == 1 else 'were'} reused; their times are what they "
        text += "cost when they were computed."
    return f"{text} Together their artifacts hold {human.size(sum(r.bytes for r in stages))}."
