"""A made-up comparison of three runs that looks like a real one."""

import numpy as np

from fpo_core.evaluation.metrics import bootstrap_draws, estimate
from fpo_core.report.comparison import (
    ComparedMetric,
    ComparedRun,
    ComparisonReport,
    PairedDifference,
)
from fpo_core.report.model import Interval
from tests.fpo_core.report.example import heldout_log, training_log

METHODS = ("FPO", "DPO", "SIMPO")


def example_metric(
    key: str, values: np.ndarray, *, reference: np.ndarray | None = None, **words: str
) -> ComparedMetric:
    """A metric of runs whose values [runs, pairs] are given, intervals and all."""
    draws = bootstrap_draws(values.shape[1], 200, 0)

    def interval(one: np.ndarray) -> Interval:
        return Interval(*estimate(one, draws))

    named = {"label": key, "description": f"what {key} is", "unit": "nats", "better": "neither"}
    return ComparedMetric(
        key=key,
        reference=None if reference is None else interval(reference),
        runs=tuple(map(interval, values)),
        differences=tuple(
            PairedDifference(run, minus, interval(values[run] - values[minus]))
            for minus in range(len(values)) for run in range(minus + 1, len(values))
        ),
        **{**named, **words},  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


def example_metrics(runs: int) -> tuple[ComparedMetric, ...]:
    rng = np.random.default_rng(2)
    correct = rng.uniform(size=(runs, 60)) < np.linspace(0.85, 0.55, runs)[:, None]
    shared = rng.normal(1.65, 0.2, 60)
    return (
        example_metric(
            "accuracy", correct.astype(float), reference=(rng.uniform(size=60) < 0.5).astype(float),
            label="Accuracy (average log-prob)", unit="share", better="higher",
        ),
        example_metric(
            "discrepancy", rng.uniform(0, 0.02, (runs, 60)) * (1 + np.arange(runs))[:, None],
            label="Feature discrepancy", unit="", better="lower",
        ),
        example_metric(
            "entropy", shared + rng.normal(0, 0.02, (runs, 60)), reference=shared,
            label="Entropy of sampled answers",
        ),
    )  # fmt: skip


def example_runs(names: tuple[str, ...]) -> tuple[ComparedRun, ...]:
    return tuple(
        ComparedRun(
            name=name,
            settings=(name,),
            evaluation=f"evaluation/{place:016x}",
            policy=f"policy/{place:016x}",
            created="2026-03-14T15:09:26+00:00",
            machine="a host (Linux-x86_64)",
            training=training_log(60, place).with_columns(
                peak_memory_mb=45_100.0 + 2_000 * place, seconds=1.5 + place
            ),
            heldout=heldout_log(),
        )
        for place, name in enumerate(names)
    )


def example_comparison(**changes: object) -> ComparisonReport:
    """A full comparison; any field may be replaced."""
    names: tuple[str, ...] = changes.pop("names", METHODS)  # pyright: ignore[reportAssignmentType]
    values: dict[str, object] = {
        "title": f"Comparison of {len(names)} runs",
        "columns": ("Method",),
        "runs": example_runs(names),
        "metrics": example_metrics(len(names)),
        "refused": (),
        "no_curves": {},
        "pairs": 60,
        "prompts": 60,
        "resamples": 200,
    }
    return ComparisonReport(**{**values, **changes})  # pyright: ignore[reportArgumentType]
