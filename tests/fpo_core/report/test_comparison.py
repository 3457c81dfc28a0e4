"""The comparison's page, figures, LaTeX and Parquet: whole, escaped, equal to each other."""

import re

import numpy as np
import polars as pl
import pytest

from fpo_core.report.charts import LINE_HEIGHT, apart
from fpo_core.report.comparison import ComparedRun, ComparisonReport
from fpo_core.report.comparison_charts import Drawn, Style, draw
from fpo_core.report.comparison_page import headline, render_comparison
from fpo_core.report.comparison_tables import cost_of, differences, tables
from fpo_core.report.latex import escape, latex
from fpo_core.report.palette import TONES
from tests.fpo_core.report.example_comparison import (
    example_comparison,
    example_metric,
    example_runs,
)
from tests.fpo_core.report.test_charts import png_chunks
from tests.fpo_core.report.test_page import read

EVIL = "<script>alert('x')</script>\"' 50% & $x_1^2$ {a}\\b #3 ~ α⁻⁵ \x07"
ARGUMENT = re.compile(r"\{((?:[^{}\\]|\\.|\{[^{}]*\})*)\}")


def parsed_latex(text: str) -> tuple[int, list[list[str]]]:
    """Columns and rows of a table; fails on what LaTeX would stumble over.

    A strict reader of the subset that we write: balanced groups, environments and formulas, known
    commands only, no active character outside of its place, as many cells as there are columns.
    """
    known = {
        "begin", "end", "centering", "caption", "label", "toprule", "midrule", "bottomrule",
        "textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater",
        "textbar", "textbardbl", "textquotedbl", "times", "alpha", "beta", "gamma", "ldots",
        "usepackage",
    }  # fmt: skip
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert set(re.findall(r"\\([A-Za-z]+)", body)) <= known
    assert set(re.findall(r"\\([^A-Za-z\n])", body)) <= set("{}$&%#_,\\")
    bare = re.sub(r"\\[^A-Za-z]", "", body)  # without escaped characters
    assert bare.count("$") % 2 == 0
    assert not set('%#~"') & set(bare)
    outside = re.sub(r"\$[^$]*\$", "", bare)
    assert not set("_^<>|") & set(outside)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    opened = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if what == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    assert re.fullmatch(r"[^\x00-\x08\x0b-\x1f\x7f]*", body)
    found = re.search(r"\\begin\{tabular\}\{([lr]+)\}\n(.*)\\end\{tabular\}", body, re.S)
    assert found is not None
    lines = [line for line in found[2].splitlines() if not line.endswith("rule")]
    assert all(line.endswith(r" \\") for line in lines)
    rows = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]
    assert {len(row) for row in rows} == {len(found[1])}
    return len(found[1]), [[cell.strip() for cell in row] for row in rows]


@pytest.fixture(scope="module")
def report() -> ComparisonReport:
    return example_comparison()


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    return render_comparison(report, tmp_path_factory.mktemp("comparison"))


def test_it_writes_the_page_every_figure_table_and_their_data(written, report):
    folder = written.parent
    figures = {path.stem for path in (folder / "figures").iterdir()}
    made = {path.stem for path in (folder / "tables").iterdir()}
    assert figures == {
        "accuracy_entropy", "kl_chosen", "kl_rejected", "kl_margin", "discrepancy_chosen",
        "discrepancy_rejected", "discrepancy_margin", "cost_peak_memory_mb", "cost_seconds",
        "cost_tokens_per_second",
    }  # fmt: skip
    assert made == {
        "accuracy_entropy", "metrics", "cost", "difference_1_2", "difference_1_3",
        "difference_2_3",
    }  # fmt: skip
    data = {path.stem for path in (folder / "data").iterdir()}
    assert data == {f"figure_{name}" for name in figures} | {f"table_{name}" for name in made}
    for path in (folder / "data").iterdir():
        assert pl.read_parquet(path).height
    for path in (folder / "figures").iterdir():
        chunks = list(png_chunks(path.read_bytes()))
        assert (chunks[0][0], chunks[-1][0]) == (b"IHDR", b"IEND")


def test_the_page_is_balanced_loads_nothing_and_runs_nothing(written):
    html, page = read(written)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "base"}
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    for href in page.attributes("href"):
        assert href == "data:," or href[1:] in ids
    for target in re.findall(r"url\(#([^)]+)\)", html):
        assert target in ids
    assert "default-src 'none'" in html
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    known = {tone.light for tone in TONES} | {"none", "transparent"}
    colours = set(re.findall(r'(?:fill|stroke)="([^"]+)"', html))
    assert len(colours) > 5
    assert colours <= known


def test_page_latex_and_parquet_say_the_same(written, report):
    _, page = read(written)
    (head,) = (table for table in tables(report) if table.name == "accuracy_entropy")
    accuracy = report.metrics[0]
    columns, rows = parsed_latex((written.parent / "tables" / "accuracy_entropy.tex").read_text())
    assert columns == 3
    assert rows[0][0] == "Method"
    assert [row[0] for row in rows[1:]] == ["reference", "FPO", "DPO", "SIMPO"]
    data = pl.read_parquet(written.parent / "data" / "table_accuracy_entropy.parquet")
    for place, interval in enumerate((accuracy.reference, *accuracy.runs)):
        assert interval is not None
        value, low, high = (
            f"{100 * one:.1f}" for one in (interval.value, interval.low, interval.high)
        )
        assert rows[place + 1][1] == rf"{value}\,\%$_{{[{low},\,{high}]}}$"
        assert head.rows[place][1].value.startswith(value)
        assert f"{low} to {high}" in page.text
        assert data["accuracy"][place] == interval.value
        assert data["accuracy_low"][place] == interval.low
    for table in (*tables(report), *differences(report)):
        parsed_latex(latex(table))


def test_text_from_data_stays_text(tmp_path):
    names = (EVIL, "b")
    runs = tuple(
        ComparedRun(**{**vars(run), "settings": (EVIL,), "machine": EVIL, "evaluation": EVIL})
        for run in example_runs(names)
    )
    hostile = example_comparison(
        names=names, runs=runs, title=EVIL, columns=(EVIL,), notes=(EVIL,), no_curves={"kl": EVIL},
        refused=((EVIL, EVIL),),
    )  # fmt: skip
    html, page = read(render_comparison(hostile, tmp_path))
    assert "<script" not in html.lower()
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.text.count(EVIL.replace("\x07", "\ufffd")) >= 8
    for path in (tmp_path / "tables").iterdir():
        parsed_latex(path.read_text())


def test_latex_escapes_every_character_that_means_something():
    assert escape("50% & a_b") == r"50\% \& a\_b"
    assert escape("{$x^2$}\\#~") == (
        r"\{\$x\textasciicircum{}2\$\}\textbackslash{}\#\textasciitilde{}"
    )
    assert escape("1.2\u202f×\u202f10⁻⁵") == r"1.2\,$\times$\,10$^{-5}$"
    assert escape("\u22120.3 α β – é 漢\n<|>") == (
        r"$-$0.3 $\alpha$ $\beta$ -- é ? \textless{}\textbar{}\textgreater{}"
    )


def test_runs_with_long_names_are_called_by_letters_that_are_explained(written):
    names = ("FPO, learning rate 1e-05, α 0.5", "FPO, learning rate 1e-05, α 2")
    drawn = draw(example_comparison(names=names, no_curves={"discrepancy": ""}))
    for drawing in drawn.every():
        for letter, name in zip("AB", names, strict=True):
            assert f"{letter}: {name}" in drawing.figure.svg
    assert Style(["FPO", "DPO"]).tags == {"FPO": "FPO", "DPO": "DPO"}
    many = Style([f"run {number}" for number in range(30)])
    assert len(set(many.tags.values())) == 30


def test_names_at_the_ends_of_lines_are_a_line_apart_and_in_order():
    places = {"a": 10.0, "b": 12.0, "c": 11.0, "d": 100.0, "e": 101.0}
    moved = {name: place + apart(places)[name] for name, place in places.items()}
    order = sorted(moved, key=lambda name: moved[name])
    assert order == ["a", "c", "b", "d", "e"]
    gaps = [moved[two] - moved[one] for one, two in zip(order, order[1:], strict=False)]
    assert min(gaps) >= LINE_HEIGHT - 1e-9
    # Blocks stay centred: nobody is moved further than needed.
    assert sum(moved[name] - places[name] for name in "abc") == pytest.approx(0)
    assert apart({"a": 0.0, "b": 50.0}) == {"a": 0.0, "b": 0.0}


@pytest.fixture(scope="module")
def partly_measured() -> Drawn:
    """Two runs, of which the second was not measured on held-out pairs in training."""
    runs = list(example_runs(("FPO", "DPO")))
    runs[1] = ComparedRun(**{**vars(runs[1]), "heldout": pl.DataFrame()})
    return draw(example_comparison(names=("FPO", "DPO"), runs=tuple(runs)))


def test_a_run_that_was_not_measured_is_said_and_the_others_drawn(partly_measured):
    (note,) = partly_measured.notes["kl"]
    assert "without DPO" in note
    assert "monitor.heldout_steps was 0" in note
    assert set(partly_measured.kl[0].data["run"]) == {"FPO"}
    assert set(partly_measured.discrepancy[0].data["run"]) == {"FPO", "DPO"}
    assert partly_measured.notes["discrepancy"] == ()


def test_margins_of_curves_are_rejected_minus_chosen(partly_measured):
    margin = next(one for one in partly_measured.kl if one.figure.name == "kl_margin").data
    assert margin["value"].to_list() == [0.0, 1.0, 2.25]


def test_curves_that_cannot_be_compared_are_left_out_with_the_reason(tmp_path):
    report = example_comparison()
    metrics = tuple(metric for metric in report.metrics if metric.key != "accuracy")
    reasons = {name: "they differ in the SAE (a: x; b: y)" for name in ("kl", "discrepancy")}
    bare = example_comparison(metrics=metrics, no_curves=reasons)
    _, page = read(render_comparison(bare, tmp_path))
    for title in ("KL to the reference", "Feature discrepancy"):
        assert f"{title} over the steps is left out: they differ in the SAE" in page.text
    assert "The plane is left out: accuracy cannot be compared." in page.text
    assert "cannot be compared in their held-out accuracy" in page.text
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "cost_peak_memory_mb", "cost_seconds", "cost_tokens_per_second",
    }  # fmt: skip
    # A comparison before it, with more runs and figures, leaves nothing; others' files stay.
    (tmp_path / "tables" / "mine.tex").write_text("somebody's own")
    render_comparison(example_comparison(names=("FPO", "DPO"), no_curves=reasons), tmp_path)
    assert {path.stem for path in (tmp_path / "tables").iterdir()} == {
        "accuracy_entropy", "metrics", "cost", "difference_1_2", "mine",
    }  # fmt: skip


def test_cost_is_the_largest_memory_and_the_median_step():
    run = example_runs(("a",))[0]
    log = pl.DataFrame(
        {"step": [1, 2, 3], "peak_memory_mb": [900.0, 1100.0, 1000.0], "seconds": [9.0, 1.0, 2.0],
         "tokens_per_second": [None, 30.0, float("nan")]}
    )  # fmt: skip
    cost = cost_of(ComparedRun(**{**vars(run), "training": log}))
    assert cost == (1100.0, 2.0, 30.0)
    empty = cost_of(ComparedRun(**{**vars(run), "training": pl.DataFrame()}))
    assert all(value != value for value in empty)


def test_the_headline_claims_what_intervals_exclude_zero_for():
    text = headline(example_comparison()).replace("\u202f", " ")
    assert re.fullmatch(
        r"FPO has the highest held-out accuracy, \d\d\.\d %, clearly above .*SIMPO.*\.", text
    )
    alike = np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    metric = example_metric("accuracy", alike, unit="share", better="higher")
    text = headline(example_comparison(metrics=(metric,))).replace("\u202f", " ")
    assert text == (
        "FPO and DPO share the highest held-out accuracy, 75.0 %, but not clearly above SIMPO."
    )
