"""The report's sections by group: what the table says, few pairs, hostile names, charts."""

import html
from pathlib import Path

import polars as pl
import pytest

from fpo_core.evaluation.breakdown import BREAKDOWN_SCHEMA, break_down
from fpo_core.report.breakdown import sections
from fpo_core.report.page import render
from tests.fpo_core.report.example import NAN, example_report
from tests.fpo_core.report.test_page import read
from tests.fpo_core.test_breakdown import random_scores

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/a onerror=x>{{ 7*7 }}"


def broken_down(**columns: list) -> pl.DataFrame:
    return break_down(random_scores(), pl.DataFrame(columns), 100, 0)


def plain(text: str) -> str:
    return text.replace("\N{NARROW NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-")


def test_a_row_is_what_the_breakdown_says():
    frame = broken_down(topic=["maths"] * 54 + ["code"] * 5 + [None])
    (section,) = sections(example_report(breakdown=frame))
    assert (section.number, section.column) == (1, "topic")
    names = [row[0].value for row in section.table.rows]
    assert names == ["(all pairs)", "maths", "code", "(no value)"]
    pairs = [(row[1].value, row[1].interval) for row in section.table.rows]
    assert pairs == [("48", ""), ("54", ""), ("5", "few pairs"), ("1", "few pairs")]
    shown = dict(zip(section.table.columns, section.table.rows[1], strict=True))
    values = {row["metric"]: row for row in frame.head(11).iter_rows(named=True)}
    accuracy = values["accuracy"]
    assert plain(shown["Accuracy after"].value) == f"{100 * accuracy['policy']:.1f} %"
    low, high = accuracy["reference_low"], accuracy["reference_high"]
    assert plain(shown["Accuracy before"].interval) == f"{100 * low:.1f} to {100 * high:.1f}"
    assert plain(shown["Change"].value) == f"{100 * accuracy['difference']:+.1f}"
    for column, metric in (("Margin after", "margin"), ("KL rejected", "kl_rejected")):
        text = plain(shown[column].value)
        decimals = len(text.partition(".")[2])
        assert text == f"{values[metric]['policy']:.{decimals}f}"
    assert "fewer than 10" in section.table.note
    assert section.figure
    assert section.figure.caption.startswith("Groups with 10 pairs or more: 1.")
    (section,) = sections(
        example_report(breakdown=broken_down(id=[str(n % 19) for n in range(60)]))
    )
    assert section.figure
    assert section.figure.caption.startswith("Every group has fewer than 10 pairs")
    large = broken_down(topic=["maths", "code"] * 30)
    (section,) = sections(example_report(breakdown=large))
    assert "fewer than 10" not in section.table.note


def test_every_column_is_a_section_of_the_page(tmp_path: Path):
    frame = broken_down(topic=["maths", "code"] * 30, score=[n / 7 for n in range(60)])
    written = render(example_report(breakdown=frame), tmp_path)
    _, parsed = read(written)
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    assert {"by-1", "by-2"} <= set(ids) & {one[1:] for one in parsed.attributes("href")}
    for text in ("Results by topic", "Results by score", "Accuracy by topic", "maths (30)"):
        assert text in parsed.text
    assert "0 to 2 (15)" in parsed.text
    charts = {path.name for path in (tmp_path / "charts").glob("results_by_*")}
    assert charts == {"results_by_1.png", "results_by_2.png"}
    render(example_report(), tmp_path)  # a later report without metadata removes them
    assert not list((tmp_path / "charts").glob("results_by_*"))
    assert "Results by" not in written.read_text()


def test_names_from_data_stay_text(tmp_path: Path):
    values = [EVIL, f"{EVIL} 2", "\x00bell\x07\n\ttab", "", "(no value)", None] * 10
    frame = broken_down(**{f"{EVIL} column": values, "other": values})
    page, parsed = read(render(example_report(breakdown=frame), tmp_path))
    assert not {tag for tag, _ in parsed.elements} & {"script", "img"}
    assert "<script" not in page.lower()
    assert f"Results by {EVIL} column" in parsed.text
    assert EVIL in parsed.text
    assert html.escape("<script>alert(", quote=False) in page  # in the drawing, too
    assert "(empty)" in parsed.text


def test_long_names_are_cut_and_stay_apart_in_the_chart():
    frame = broken_down(topic=["a" * 500 + "1", "a" * 500 + "2"] * 30)
    (section,) = sections(example_report(breakdown=frame))
    assert section.figure
    assert section.table.rows[1][0].value == "a" * 80 + "…"
    assert section.figure.svg.count(f"{'a' * 18}… (30)") == 1
    assert section.figure.svg.count(f"{'a' * 18}… #2 (30)") == 1


@pytest.mark.parametrize("missing", [None, NAN])
def test_an_accuracy_that_was_not_measured_is_said_and_not_drawn(missing):
    frame = broken_down(topic=["maths"] * 60).with_columns(
        policy=pl.when(pl.col("metric") == "accuracy").then(missing).otherwise("policy")
    )
    (section,) = sections(example_report(breakdown=frame))
    assert section.figure is None
    assert section.table.rows[1][3].value == "not measured"


def test_a_run_without_metadata_has_no_section():
    assert sections(example_report()) == ()
    empty = pl.DataFrame(schema=BREAKDOWN_SCHEMA)
    assert sections(example_report(breakdown=empty)) == ()
