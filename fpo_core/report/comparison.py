"""What a comparison of runs says, as plain values: whoever gathers the runs fills these in.

Like ``model``: rendering reads only these types, so that a page can be made from any store, in a
test or in a notebook.
"""

from dataclasses import dataclass, field
from typing import Any

import polars as pl

from fpo_core.report.model import Direction, Interval


@dataclass(frozen=True)
class ComparedRun:
    """One run."""

    name: str  # no two alike
    settings: tuple[str, ...]  # the values of the settings in which the runs differ
    evaluation: str  # of the artifact, with its name before a slash
    policy: str
    created: str  # ISO 8601
    machine: str  # that trained the policy: platform and host
    training: pl.DataFrame  # one row a step
    heldout: pl.DataFrame  # a row a measurement on held-out pairs in training; empty where none


@dataclass(frozen=True)
class PairedDifference:
    """A run's metric minus another's, on the same pairs."""

    run: int
    minus: int
    interval: Interval


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of all runs."""

    key: str
    label: str
    description: str
    unit: str  # "share" is shown in percent
    better: Direction
    reference: Interval | None  # None: not defined for it, or the runs have several
    runs: tuple[Interval, ...]
    differences: tuple[PairedDifference, ...]


@dataclass(frozen=True)
class ScoreRow:
    """A run's figures of a benchmark, by the figure's name."""

    run: str
    cells: dict[str, "ScoreCell"]


@dataclass(frozen=True)
class ScoreCell:
    """One figure, with how many verdicts it rests on."""

    value: float | None  # None: nothing could be judged
    low: float | None
    high: float | None
    judged: int
    asked: int


@dataclass(frozen=True)
class ScoreTable:
    """Scores whose keys are equal."""

    benchmark: str
    opponent: str | None  # None: the models were rated alone
    temperature: float | None
    key: dict[str, Any]
    columns: dict[str, tuple[str, str]]  # a figure's name -> its label and unit
    rows: tuple[ScoreRow, ...]


@dataclass(frozen=True)
class ComparisonReport:
    """Runs side by side."""

    title: str
    columns: tuple[str, ...]  # the settings in which the runs differ, as tables name them
    runs: tuple[ComparedRun, ...]
    metrics: tuple[ComparedMetric, ...]
    refused: tuple[tuple[str, str], ...]  # metrics that are not compared, and why
    no_curves: dict[str, str]  # "kl" or "discrepancy" -> why the runs' curves are not comparable
    pairs: int
    prompts: int
    resamples: int
    scores: tuple[ScoreTable, ...] = ()
    rates: pl.DataFrame = field(default_factory=pl.DataFrame)  # win rates by temperature
    notes: tuple[str, ...] = ()
