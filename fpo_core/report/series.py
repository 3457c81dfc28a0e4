"""A column of the training log made ready to draw: finite values, a smoothed line, fewer points.

Curves a step are noisy, so a chart shows every step faintly and an exponential mean on top. The
mean looks back only: at each step it knows what had been seen by then, and has no edge effect at
the end, which is the part that people read off.
"""

from dataclasses import dataclass

import polars as pl

MIN_SMOOTHED_STEPS = 8
# More points than pixels only make the page heavy; extremes are kept, so no spike is hidden.
MAX_DRAWN_POINTS = 1200


@dataclass(frozen=True)
class Series:
    """One column with its steps."""

    frame: pl.DataFrame  # step, value, smooth (float64, finite)
    half_life: int | None  # steps; None: too few to smooth
    skipped: int  # steps whose value is missing or not finite

    @property
    def first(self) -> float:
        """The value at the first step."""
        return float(self.frame["value"][0])

    @property
    def last(self) -> float:
        """The mean over the last tenth of the steps."""
        tenth = max(self.frame.height // 10, 1)
        return float(self.frame["value"].tail(tenth).to_numpy().mean())


def read_series(training: pl.DataFrame, column: str) -> Series | None:
    """A column of the training log; None where it is missing or has no finite value.

    Args:
        training: one row a step; without a ``step`` column, rows count from 1.
        column: the column to read.
    """
    if column not in training.columns:
        return None
    steps = pl.col("step") if "step" in training.columns else pl.int_range(1, pl.len() + 1)
    values = pl.col(column).cast(pl.Float64, strict=False)
    frame = training.select(steps.cast(pl.Float64).alias("step"), values.alias("value"))
    finite = frame.filter(pl.col("step").is_finite() & pl.col("value").is_finite()).sort("step")
    if finite.is_empty():
        return None
    half_life = None
    smooth = pl.col("value")
    if finite.height >= MIN_SMOOTHED_STEPS:
        half_life = max(2, round(finite.height / 30))
        smooth = smooth.ewm_mean(half_life=half_life)
    return Series(
        finite.with_columns(smooth.alias("smooth")), half_life, frame.height - finite.height
    )


def thin(frame: pl.DataFrame, limit: int = MAX_DRAWN_POINTS) -> pl.DataFrame:
    """At most about ``limit`` rows: the lowest and the highest value of each run of steps."""
    if frame.height <= limit:
        return frame
    run = pl.int_range(pl.len()) * (limit // 2) // frame.height
    value = pl.col("value")
    extreme = (value == value.min().over(run)) | (value == value.max().over(run))
    end = pl.int_range(pl.len()) == pl.len() - 1
    # A run of equal values would keep them all: one of each is enough.
    return frame.with_columns(run.alias("run")).filter(extreme | end).unique(
        ["run", "value"], keep="last", maintain_order=True
    ).drop("run")  # fmt: skip
