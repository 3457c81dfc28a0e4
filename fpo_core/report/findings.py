"""What the metrics say in words. Only a difference whose interval excludes zero is a finding."""

import math
from collections.abc import Sequence
from typing import Literal

from fpo_core.report.human import NARROW, NOT_MEASURED, decimals_for, number, percent
from fpo_core.report.model import Interval, MetricRow, RunReport

Verdict = Literal["better", "worse", "changed", "unclear", "unmeasured", "no comparison"]
# Below this a bound in whole points could read as 0, which is what an interval is read for.
_WHOLE_POINTS_FROM = 0.015


def is_measured(interval: Interval | None) -> bool:
    """Whether there is a value; its bounds may still be missing."""
    return interval is not None and math.isfinite(interval.value)


def excludes_zero(interval: Interval) -> bool:
    """Whether the whole interval lies on one side of zero (bounds that are NaN never do)."""
    return interval.low > 0 or interval.high < 0


def verdict(metric: MetricRow) -> Verdict:
    """What the difference between policy and reference amounts to."""
    if not is_measured(metric.policy):
        return "unmeasured"
    difference = metric.difference
    if difference is None:
        return "no comparison"
    if not is_measured(difference):
        return "unmeasured"
    if not excludes_zero(difference):
        return "unclear"
    if metric.better == "neither":
        return "changed"
    return "better" if (difference.low > 0) == (metric.better == "higher") else "worse"


def headline(report: RunReport) -> str:
    """One to three sentences that say what the run did, from the metrics alone."""
    method = report.method.upper()
    metric = _main_metric(report.metrics)
    if metric is None:
        return f"{method} finished training; no held-out metric was measured."
    sentences = [_main_sentence(method, metric)]
    discrepancy = _discrepancy_sentence(report.metrics)
    if discrepancy:
        sentences.append(discrepancy)
    worse = [_name(m) for m in report.metrics if m is not metric and verdict(m) == "worse"]
    if worse:
        sentences.append(f"Clearly worse: {', '.join(worse)}.")
    return " ".join(sentences)


def with_unit(value: float, unit: str, decimals: int, *, difference: bool = False) -> str:
    """A metric's value; a difference carries its sign, and of shares it is in points."""
    if not math.isfinite(value):
        return NOT_MEASURED
    if unit != "share":
        return number(value, decimals, sign=difference)
    if difference:
        return number(100 * value, max(decimals - 2, 0), sign=True)
    return percent(value, max(decimals - 2, 0))


def metric_decimals(metric: MetricRow) -> int:
    """Decimals that suit all of a metric's intervals, so that its row lines up."""
    found = [metric.reference, metric.policy, metric.difference]
    widths = [one.high - one.low for one in found if one is not None]
    widths = [width for width in widths if math.isfinite(width) and width > 0]
    if metric.unit == "share":
        return 3
    if widths:
        return decimals_for(min(widths))
    values = [abs(one.value) for one in found if is_measured(one) and one and one.value]
    return min(decimals_for(min(values)) + 1, 6) if values else 1


def _main_metric(metrics: Sequence[MetricRow]) -> MetricRow | None:
    """Accuracy, else the first metric with a direction and a comparison, else the first."""
    named = [m for m in metrics if m.key == "accuracy"]
    compared = [m for m in metrics if m.difference is not None and m.better != "neither"]
    return next(iter([*named, *compared, *metrics]), None)


def _name(metric: MetricRow) -> str:
    if metric.key == "accuracy":
        return "held-out accuracy"
    label = metric.label
    # "KL divergence" keeps its capitals, "Average margin" does not.
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def _main_sentence(method: str, metric: MetricRow) -> str:
    name, found = _name(metric), verdict(metric)
    if found == "unmeasured":
        if not is_measured(metric.policy):
            return f"{method} ran, but its {name} could not be measured."
        return f"{method} ended at {name} {_value(metric)}; the change could not be measured."
    if found == "no comparison" or metric.difference is None or metric.reference is None:
        return f"{method} ended at {name} {_value(metric)}; there is no reference value to compare."
    change = _change(metric)
    if found == "unclear":
        if metric.difference.value == 0:
            return f"{method} did not change {name}: {_value(metric)} before and after {change}."
        before, after = _both(metric)
        known = math.isfinite(metric.difference.low) and math.isfinite(metric.difference.high)
        why = ", an interval that includes zero" if known else ""
        return (
            f"{method} did not clearly change {name}: {before} before, {after} after {change}{why}."
        )
    before, after = _both(metric)
    if found == "changed":
        return f"{method} moved {name} from {before} to {after} {change}."
    word = "improved" if found == "better" else "made"
    tail = "" if found == "better" else " worse:"
    return f"{method} {word} {name}{tail} from {before} to {after} {change}."


def _both(metric: MetricRow) -> tuple[str, str]:
    """Before and after, with as many digits as it takes to tell them apart."""
    assert metric.reference is not None
    first = 2 if metric.unit == "share" else metric_decimals(metric)
    same = metric.reference.value == metric.policy.value
    before = after = ""
    for decimals in range(first, 7):
        before = with_unit(metric.reference.value, metric.unit, decimals)
        after = with_unit(metric.policy.value, metric.unit, decimals)
        if before != after or same:
            break
    return before, after


def _value(metric: MetricRow) -> str:
    decimals = 2 if metric.unit == "share" else metric_decimals(metric)
    return with_unit(metric.policy.value, metric.unit, decimals)


def _change(metric: MetricRow) -> str:
    difference = metric.difference
    assert difference is not None
    if not math.isfinite(difference.low) or not math.isfinite(difference.high):
        return "(no interval)"
    ends = (difference.low, difference.high)
    decimals = metric_decimals(metric)
    if metric.unit == "share" and min(map(abs, ends)) >= _WHOLE_POINTS_FROM:
        decimals = 2
    value, low, high = (
        with_unit(one, metric.unit, decimals, difference=True) for one in (difference.value, *ends)
    )
    unit = f"{NARROW}points" if metric.unit == "share" else ""
    return f"({value}{unit}, 95{NARROW}% interval {low} to {high})"


def _discrepancy_sentence(metrics: Sequence[MetricRow]) -> str | None:
    by_key = {metric.key: metric for metric in metrics if is_measured(metric.policy)}
    both = by_key.get("discrepancy")
    if both is not None:
        text = with_unit(both.policy.value, both.unit, metric_decimals(both))
        return f"Feature discrepancy from the reference is {text}, where 0 is no drift."
    sides = [
        f"{with_unit(one.policy.value, one.unit, metric_decimals(one))} on {side} answers"
        for side in ("chosen", "rejected")
        if (one := by_key.get(f"discrepancy_{side}")) is not None
    ]
    if not sides:
        return None
    return f"Feature discrepancy from the reference is {' and '.join(sides)}, where 0 is no drift."
