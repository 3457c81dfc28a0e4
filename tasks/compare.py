"""Finished runs side by side: what their artifacts say, gathered for ``fpo_core.report``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from fpo_core.evaluation.compare import (
    REFERENCE,
    SAE,
    SAMPLING,
    Comparison,
    Measured,
    compare,
    told_apart,
)
from fpo_core.evaluation.differing import differing_settings, run_names, shown, title_of
from fpo_core.evaluation.metrics import Estimate
from fpo_core.evaluation.tables import read_answered, read_heldout
from fpo_core.report.comparison import (
    ComparedMetric,
    ComparedRun,
    ComparisonReport,
    PairedDifference,
)
from fpo_core.report.comparison_page import render_comparison
from fpo_core.report.model import Interval
from fpo_core.report.scores import score_tables, win_rates
from storage.store import Store
from tasks.finished import FinishedRun, StoredRuns
from tasks.report import HELDOUT

SCORES = "scores"  # artifacts of benchmarks; an input of theirs is the policy
NOT_SAMPLING = ("prompts", "bootstrap", "seed", "k", "attention")  # of the evaluation's settings
OF_CURVES = ("train.k", "train.index_set", "train.pooled", "train.groups", "sae", "sae.layer",
             "sae.site", "model", "reference", "data.train")  # fmt: skip


class ComparedRuns(NamedTuple):
    """A comparison: what a program reads of it, and what a page shows."""

    comparison: Comparison
    report: ComparisonReport

    def with_report(self, **changes: Any) -> "ComparedRuns":
        """The same with some of the report's fields changed."""
        return self._replace(report=dataclasses.replace(self.report, **changes))


def compare_runs(store: Store, names: Sequence[str]) -> ComparedRuns:
    """Compare finished runs.

    Args:
        store: where their artifacts are.
        names: of the runs, as ``StoredRuns.find`` reads them.

    Raises:
        FPOError: a name that is of no finished run, or runs that cannot be compared in anything.
    """
    stored = StoredRuns(store)
    runs = stored.find(names)
    settings = [run.settings for run in runs]
    keys = differing_settings(settings)
    called = run_names(settings, keys, [run.evaluation.name for run in runs])
    measured = [_measured(run, name) for run, name in zip(runs, called, strict=True)]
    resamples = max(run.settings["evaluation.bootstrap"] for run in runs)
    comparison = compare(measured, resamples, runs[0].settings["evaluation.seed"])
    compared = tuple(_compared_run(run, name, keys) for run, name in zip(runs, called, strict=True))
    records = {name: _scores(stored, run) for run, name in zip(runs, called, strict=True)}
    report = ComparisonReport(
        title=f"Comparison of {len(runs)} runs",
        columns=tuple(map(title_of, keys)),
        runs=compared,
        metrics=_metrics(comparison),
        refused=tuple((one.label, one.reason) for one in comparison.refused),
        no_curves=_no_curves(comparison, runs, compared),
        pairs=comparison.pairs,
        prompts=comparison.prompts,
        resamples=resamples,
        scores=score_tables(records),
        rates=win_rates(records),
        notes=_notes(compared),
    )
    return ComparedRuns(comparison, report)


def write_comparison(compared: ComparedRuns, folder: Path) -> Path:
    """Render a comparison; returns the HTML file."""
    return render_comparison(compared.report, folder)


def _measured(run: FinishedRun, name: str) -> Measured:
    settings, inputs = run.settings, run.evaluation.manifest["inputs"]
    features = run.settings
    sampling = {
        key.removeprefix("evaluation."): value
        for key, value in settings.items()
        if key.startswith("evaluation.") and key.removeprefix("evaluation.") not in NOT_SAMPLING
    }
    k = run.evaluation.manifest["recipe"]["k"]
    key = {
        REFERENCE: run.policy.manifest["inputs"]["model"],
        SAE: f"{inputs['sae']}, layer {features['sae.layer']} {features['sae.site']}, top {k}",
        SAMPLING: ", ".join(f"{one}={value}" for one, value in sorted(sampling.items())),
    }
    pairs, answers = (
        pl.read_parquet(run.evaluation.path(f"{table}.parquet")) for table in ("pairs", "answers")
    )
    return Measured(name, read_heldout(pairs), read_answered(answers), key)


def _compared_run(run: FinishedRun, name: str, keys: Sequence[str]) -> ComparedRun:
    made = run.policy.manifest["provenance"]
    watched = HELDOUT in run.policy.files
    return ComparedRun(
        name=name,
        settings=tuple(shown(key, run.settings.get(key)) for key in keys),
        evaluation=run.evaluation.name,
        policy=run.policy.name,
        created=run.evaluation.manifest["created"],
        machine=f"{made['host']} ({made['platform']})",
        training=pl.read_parquet(run.policy.path("metrics.parquet")),
        heldout=pl.read_parquet(run.policy.path(HELDOUT)) if watched else pl.DataFrame(),
    )


def _metrics(comparison: Comparison) -> tuple[ComparedMetric, ...]:
    return tuple(
        ComparedMetric(
            one.key, one.label, one.description, one.unit, one.better,  # pyright: ignore[reportArgumentType]
            None if one.reference is None else _interval(one.reference),
            tuple(map(_interval, one.runs)),
            tuple(PairedDifference(d.run, d.minus, _interval(d.estimate)) for d in one.differences),
        )
        for one in comparison.metrics
    )  # fmt: skip


def _interval(estimate: Estimate) -> Interval:
    return Interval(*estimate)


def _no_curves(
    comparison: Comparison, runs: Sequence[FinishedRun], compared: Sequence[ComparedRun]
) -> dict[str, str]:
    """Why the runs' curves over the steps cannot be in one chart, where they cannot."""
    found = {one.key.partition("_")[0]: one.reason for one in comparison.refused
             if one.key == "kl_chosen"}  # fmt: skip
    counts = {
        run.name: f"the first {run.heldout['pairs'][0]}" for run in compared if run.heldout.height
    }
    monitored = told_apart("held-out pairs measured in training", counts) if counts else ""
    if monitored:
        found.setdefault("kl", monitored)
    made = {
        run.name: ", ".join(
            f"{key} {shown(key, finished.settings.get(key))}"
            for key in differing_settings([one.settings for one in runs])
            if key in OF_CURVES
        )
        for run, finished in zip(compared, runs, strict=True)
    }
    differing = told_apart("settings of the discrepancy", made)
    return {**found, **({"discrepancy": differing} if differing else {})}


def _notes(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    machines = list(dict.fromkeys(run.machine for run in runs))
    if len(machines) == 1:
        return ()
    return (
        f"The policies were trained on different machines ({', '.join(machines)}): their memory "
        f"and times are not comparable.",
    )


def _scores(stored: StoredRuns, run: FinishedRun) -> list[dict[str, Any]]:
    """The benchmark scores of a run's policy."""
    artifacts = stored.of_policy(SCORES, run.policy)
    return [
        record
        for artifact in artifacts
        for record in json.loads(artifact.path("scores.json").read_text())
    ]
