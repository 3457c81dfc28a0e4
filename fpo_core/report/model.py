"""What a report says, as plain values: whoever gathers a run fills these in, nothing else.

Rendering reads only this module's types, so that a report can be made from any store, in a test
or in a notebook.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

State = Literal["computed", "reused", "resumed"]
Direction = Literal["higher", "lower", "neither"]
Side = Literal["chosen", "rejected"]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class StageRow:
    """What became of one stage."""

    stage: str
    version: str  # of its artifact, with or without the artifact's name before a slash
    state: State
    rows: int | None
    bytes: int
    seconds: float  # what computing it took, also where it was reused
    inputs: dict[str, str]  # name -> version of another stage, or a content digest


@dataclass(frozen=True)
class MetricRow:
    """A metric before and after training, on the same held-out pairs."""

    key: str
    label: str
    description: str
    unit: str  # "share" is shown in percent
    better: Direction
    reference: Interval | None  # None: not defined for the reference
    policy: Interval
    difference: Interval | None  # policy minus reference, paired


@dataclass(frozen=True)
class FeatureShift:
    """One SAE feature's mean pooled activation on held-out answers, before and after.

    The change has the audit's 95 % t-interval, and its effect size: the mean of the answers'
    changes over their standard deviation.
    """

    feature: int
    side: Side
    reference: float
    policy: float
    low: float
    high: float
    effect: float
    tokens: tuple[str, ...]  # that it is most active on, strongest first


@dataclass(frozen=True)
class GroupShift:
    """The same of the mean over a feature group."""

    group: str
    size: int
    side: Side
    reference: float
    policy: float
    low: float
    high: float
    effect: float


@dataclass(frozen=True)
class Sample:
    """Answers to one prompt before and after training."""

    prompt: str
    before: str
    after: str
    stop_before: str  # why sampling ended: "end of turn", "length", or other words
    stop_after: str


@dataclass(frozen=True)
class RunReport:
    """One run."""

    recipe_name: str
    method: str
    title: str
    created: str  # ISO 8601; other text is shown as it is
    git_commit: str | None
    stages: tuple[StageRow, ...]
    training: pl.DataFrame  # one row a step; see ``charts`` for the columns it looks for
    metrics: tuple[MetricRow, ...]
    features: tuple[FeatureShift, ...]
    groups: tuple[GroupShift, ...]
    moved: tuple[int, int]  # features and sides that moved, of those that fire
    samples: tuple[Sample, ...]
    recipe_yaml: str
    notes: tuple[str, ...]
    evaluation: str = ""  # the artifact it was made from
    heldout_pairs: int | None = None  # that the intervals are over
    heldout: pl.DataFrame = field(default_factory=pl.DataFrame)  # a row a measurement in training
    benchmarks: tuple[Mapping[str, Any], ...] = ()  # records of `scores.json`
    breakdown: pl.DataFrame = field(default_factory=pl.DataFrame)  # metrics by metadata group
    data: Mapping[str, Any] = field(default_factory=dict)  # statistics of the `pairs` artifact
