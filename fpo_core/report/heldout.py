"""Charts of what training measured on held-out pairs: a dot a measurement, none smoothed."""

from dataclasses import replace

import polars as pl

from fpo_core.report import palette
from fpo_core.report.charts import SIDE_COLOURS, SIDES, Curve, Figure, figure, layers
from fpo_core.report.human import number, percent
from fpo_core.report.series import Series, read_series

ACCURACY = Curve(
    "accuracy", "Held-out reward accuracy", "share of held-out pairs where the chosen answer gains "
    "more", shares=True, level=0.5, level_name="chance",
)  # fmt: skip
KL = Curve("kl", "Held-out KL to the reference", "nats an answer, summed over its tokens")
FVU = Curve("fvu", "SAE on the policy", "share of the activations' variance left unexplained (FVU)")


def heldout_figures(heldout: pl.DataFrame) -> tuple[Figure, ...]:
    """The charts that the table of measurements has figures for."""
    tones = (palette.CURVE.light, palette.CHOSEN.light, palette.REJECTED.light)
    places = [name.partition(".")[2] for name in heldout.columns if name.startswith("fvu.")]
    saes = {place: tones[number % len(tones)] for number, place in enumerate(places)}
    drawn = (
        _lines(heldout, ACCURACY, {"": ACCURACY.column}, {"": palette.CURVE.light}),
        _lines(heldout, KL, {side: f"kl_{side}" for side in SIDES}, SIDE_COLOURS),
        _lines(heldout, FVU, {place: f"fvu.{place}" for place in places}, saes),
    )
    return tuple(figure for figure in drawn if figure is not None)


def _lines(
    heldout: pl.DataFrame, curve: Curve, columns: dict[str, str], colours: dict[str, str]
) -> Figure | None:
    """One chart of the columns, by the name of their line; None where no column has a figure."""
    read = {name: every_point(read_series(heldout, column)) for name, column in columns.items()}
    found = {name: series for name, series in read.items() if series is not None}
    if not found:
        return None
    show = percent if curve.shares else number
    ends = [
        f"{name}: {show(values[0])} at step {steps[0]:.0f}, {show(values[-1])} at step "
        f"{steps[-1]:.0f}".removeprefix(": ")
        for name, series in found.items()
        for steps, values in [(series.frame["step"], series.frame["value"])]
    ]
    chart = layers(curve, found, colours, named=len(found) > 1)
    return figure(f"heldout_{curve.column}", chart, curve.title, f"{'; '.join(ends)}.")


def every_point(series: Series | None) -> Series | None:
    """A series of few measurements, each drawn as it is."""
    if series is None:
        return None
    frame = series.frame.with_columns(pl.col("value").alias("smooth"))
    return replace(series, frame=frame, half_life=None)
