"""The headline states what the data say, no more."""

from fpo_core.report.findings import headline, verdict
from fpo_core.report.model import MetricRow
from tests.fpo_core.report.example import NAN, example_report, metric

MISSING = (NAN, NAN, NAN)


def sentence(*metrics: MetricRow, method: str = "fpo") -> str:
    return headline(example_report(metrics=metrics, method=method)).replace("\u202f", " ")


def test_improved() -> None:
    assert sentence(metric()) == (
        "FPO improved held-out accuracy from 41 % to 78 % (+37 points, 95 % interval +28 to +46)."
    )


def test_got_worse() -> None:
    worse = metric(after=(0.35, 0.3, 0.4), difference=(-0.06, -0.09, -0.02))
    assert sentence(worse, method="dpo") == (
        "DPO made held-out accuracy worse: from 41 % to 35 % (−6 points, 95 % interval −9 to −2)."
    )


def test_an_interval_that_includes_zero_is_no_change() -> None:
    unclear = metric(after=(0.43, 0.36, 0.5), difference=(0.02, -0.035, 0.071))
    text = sentence(unclear)
    assert text.startswith("FPO did not clearly change held-out accuracy: 41 % before, 43 % after")
    assert "includes zero" in text
    assert "improved" not in text


def test_an_interval_that_touches_zero_includes_it() -> None:
    assert verdict(metric(difference=(0.02, 0.0, 0.04))) == "unclear"


def test_nothing_moved() -> None:
    still = metric(after=(0.41, 0.335, 0.489), difference=(0.0, 0.0, 0.0))
    assert sentence(still).startswith("FPO did not change held-out accuracy: 41 % before and after")


def test_small_changes_get_the_digits_that_show_them() -> None:
    small = metric(
        before=(0.6404, 0.63, 0.65), after=(0.6441, 0.63, 0.65), difference=(0.0037, 0.001, 0.006)
    )
    assert sentence(small) == (
        "FPO improved held-out accuracy from 64.0 % to 64.4 % "
        "(+0.4 points, 95 % interval +0.1 to +0.6)."
    )


def test_lower_can_be_better() -> None:
    drop = metric(
        "perplexity", (9.0, 8.0, 10.0), (7.0, 6.0, 8.0), (-2.0, -3.0, -1.0),
        label="Perplexity", unit="", better="lower",
    )  # fmt: skip
    assert verdict(drop) == "better"
    assert sentence(drop).startswith("FPO improved perplexity from 9.0 to 7.0")


def test_a_change_with_no_direction_is_not_praised() -> None:
    moved = metric(
        "entropy", (1.7, 1.6, 1.8), (1.4, 1.3, 1.5), (-0.3, -0.4, -0.2),
        label="Entropy", unit="nats", better="neither",
    )  # fmt: skip
    assert verdict(moved) == "changed"
    assert sentence(moved).startswith("FPO moved entropy from 1.70 to 1.40")


def test_what_could_not_be_measured_is_said() -> None:
    assert sentence(metric(after=MISSING)) == (
        "FPO ran, but its held-out accuracy could not be measured."
    )
    assert sentence(metric(difference=MISSING)) == (
        "FPO ended at held-out accuracy 78 %; the change could not be measured."
    )
    assert sentence(metric(before=None, difference=None)) == (
        "FPO ended at held-out accuracy 78 %; there is no reference value to compare."
    )
    assert sentence() == "FPO finished training; no held-out metric was measured."


def test_bounds_that_are_nan_are_no_finding() -> None:
    unknown = metric(difference=(0.37, NAN, NAN))
    assert verdict(unknown) == "unclear"
    assert "(no interval)" in sentence(unknown)
    assert "includes zero" not in sentence(unknown)


def test_discrepancy_and_other_losses_are_named() -> None:
    drift = metric(
        "discrepancy", None, (0.0164, 0.0151, 0.0179), None,
        label="Feature discrepancy", unit="", better="lower",
    )  # fmt: skip
    margin = metric(
        "margin", (0.5, 0.4, 0.6), (0.2, 0.1, 0.3), (-0.3, -0.4, -0.2),
        label="Average log-prob margin", unit="nats",
    )  # fmt: skip
    text = sentence(metric(), drift, margin)
    assert "Feature discrepancy from the reference is 0.0164, where 0 is no drift." in text
    assert text.endswith("Clearly worse: average log-prob margin.")


def test_discrepancy_by_side() -> None:
    sides = [
        metric(f"discrepancy_{side}", None, (value, value * 0.9, value * 1.1), None, unit="")
        for side, value in (("chosen", 0.01), ("rejected", 0.02))
    ]
    assert "is 0.0100 on chosen answers and 0.0200 on rejected answers" in sentence(
        metric(), *sides
    )
