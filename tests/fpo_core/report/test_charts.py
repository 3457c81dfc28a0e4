"""Charts: valid files, one theme for both light and dark, nothing drawn that was not measured."""

import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest

from fpo_core.report.charts import PNG_SCALE, Drawn, draw
from fpo_core.report.heldout import heldout_figures
from fpo_core.report.human import NARROW
from fpo_core.report.model import FeatureShift
from fpo_core.report.palette import TONES, WIDTH
from fpo_core.report.series import read_series, thin
from tests.fpo_core.report.example import NAN, example_report, heldout_log, training_log


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return draw(example_report())


def png_chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", png[at + 8 + length : at + 12 + length])
        assert zlib.crc32(kind + data) == check
        yield kind, data
        at += 12 + length


def test_png_files_are_whole_and_at_double_size(drawn: Drawn) -> None:
    for figure in (*drawn.curves, *drawn.features):
        chunks = list(png_chunks(figure.png))
        assert chunks[0][0] == b"IHDR"
        assert chunks[-1][0] == b"IEND"
        width, height = struct.unpack(">II", chunks[0][1][:8])
        assert width == PNG_SCALE * WIDTH
        pixels = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
        assert len(pixels) >= width * height
        assert len(set(pixels)) > 20  # not one flat colour


def test_every_colour_of_a_drawing_has_a_dark_counterpart(drawn: Drawn) -> None:
    known = {tone.light for tone in TONES} | {"none", "transparent"}
    for figure in (*drawn.curves, *drawn.features):
        assert set(re.findall(r'(?:fill|stroke)="([^"]+)"', figure.svg)) <= known


def test_colours_stand_out_from_their_surface() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    surface, ink, muted, _grid, *lines = TONES
    for tone in (ink, muted, *lines):
        for one, ground in zip(tone, surface, strict=True):
            low, high = sorted((luminance(one), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, tone


def test_captions_state_where_the_curves_start_and_end() -> None:
    steps = 40
    log = pl.DataFrame({"step": range(1, steps + 1), "loss": [0.75] + [0.5] * 35 + [0.25] * 4})
    report = draw(example_report(training=log, features=()))
    assert report.curves[0].caption == "0.750 at the first step, 0.250 over the last tenth."
    assert len(report.omitted) == 3


def test_steps_that_are_not_finite_are_counted_not_drawn() -> None:
    log = training_log(30).with_columns(
        loss=pl.when(pl.col("step").is_in([3, 4])).then(NAN).otherwise(pl.col("loss")),
        margin=pl.lit(float("inf")),
    )
    report = draw(example_report(training=log))
    assert "2 steps have no finite value and are not drawn." in report.curves[0].caption
    assert "nan" not in report.curves[0].svg.lower()
    assert any(s.startswith("Implicit reward margin is left out") for s in report.omitted)


def test_one_side_of_the_discrepancy_is_shown_in_part() -> None:
    report = draw(example_report(training=training_log().drop("discrepancy_rejected")))
    assert report.curves[-1].name == "discrepancy"
    assert ">chosen<" in report.curves[-1].svg
    assert ">rejected<" not in report.curves[-1].svg
    assert any("shown in part" in sentence for sentence in report.omitted)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_are_not_smoothed(steps: int) -> None:
    report = draw(example_report(training=training_log(steps)))
    assert len(report.curves) == 4
    assert "too few to smooth" in report.reading


@pytest.mark.parametrize("steps", [3, 7])
def test_each_step_of_a_short_run_is_marked_once(steps: int) -> None:
    """Vega's own ticks for 1 to 3 are halves, of which whole numbers would be 1, 2, 2, 3, 3."""
    report = draw(example_report(training=training_log(steps)))
    labels = re.findall(r">([^<>]+)</text>", report.curves[0].svg)
    assert labels[: labels.index("step")] == [str(n) for n in range(1, steps + 1)]


def test_no_curves_need_no_reading() -> None:
    assert draw(example_report(training=pl.DataFrame({"step": [1, 2]}))).reading == ""


def test_features_of_one_side_and_values_that_are_not_finite() -> None:
    shifts = (
        FeatureShift(1, "chosen", 0.1, 0.4, 0.2, 0.4, 1.0, ()),
        FeatureShift(2, "chosen", NAN, 0.4, NAN, NAN, NAN, ()),
        FeatureShift(3, "chosen", 0.0, 0.0, 0.0, 0.0, 0.0, ()),
    )
    (figure,) = draw(example_report(features=shifts)).features
    assert figure.name == "features_chosen"
    assert "#1<" in figure.svg
    assert "#2<" not in figure.svg
    assert figure.caption == "1 of these 2 features became more active, 0 less."


def test_held_out_figures_are_drawn_as_measured_and_left_out_where_there_are_none() -> None:
    figures = {figure.name: figure for figure in heldout_figures(heldout_log())}
    assert list(figures) == ["heldout_accuracy", "heldout_kl", "heldout_fvu"]
    caption = figures["heldout_accuracy"].caption.replace(NARROW, "")
    assert caption == "0.0% at step 0, 71.9% at step 160."
    assert "rejected: 0 at step 0, 4.75 at step 160" in figures["heldout_kl"].caption
    assert "25-resid_post" in figures["heldout_fvu"].svg
    chunks = dict(png_chunks(figures["heldout_fvu"].png))
    assert struct.unpack(">II", chunks[b"IHDR"][:8])[0] == PNG_SCALE * WIDTH
    one = heldout_figures(heldout_log().select("step", "accuracy"))
    assert [figure.name for figure in one] == ["heldout_accuracy"]
    assert heldout_figures(pl.DataFrame()) == ()


def test_the_log_need_not_count_its_steps() -> None:
    series = read_series(pl.DataFrame({"loss": [3, 2, None]}), "loss")
    assert series is not None
    assert series.frame["step"].to_list() == [1.0, 2.0]
    assert (series.first, series.last, series.skipped, series.half_life) == (3.0, 2.0, 1, None)


def test_columns_of_nulls_or_of_no_numbers_are_no_series() -> None:
    log = pl.DataFrame({"loss": [None, None], "accuracy": [NAN, NAN]})
    assert read_series(log, "loss") is None
    assert read_series(log, "accuracy") is None
    assert read_series(log, "margin") is None


def test_smoothing_is_the_exponential_mean_by_hand() -> None:
    values = [float(v) for v in (4, 0, 8, 2, 6, 1, 3, 5)]
    series = read_series(pl.DataFrame({"loss": values}), "loss")
    assert series is not None
    assert series.half_life == 2
    decay = 0.5 ** (1 / 2)
    for end in range(1, len(values) + 1):
        weights = decay ** np.arange(end)[::-1]
        expected = np.average(values[:end], weights=weights)
        assert series.frame["smooth"][end - 1] == pytest.approx(expected)


def test_thinning_keeps_the_extremes_and_the_last_step() -> None:
    values = np.random.default_rng(0).normal(size=50_000)
    values[12_345] = 99.0
    frame = pl.DataFrame({"step": np.arange(50_000.0), "value": values, "smooth": values})
    thinned = thin(frame, 1000)
    assert thinned.height <= 1001
    assert thinned["value"].max() == 99.0
    assert thinned["value"].min() == values.min()
    assert thinned["step"].is_sorted()
    assert thinned["step"][-1] == 49_999
    assert thin(frame.with_columns(value=1.0), 1000).height <= 1001
