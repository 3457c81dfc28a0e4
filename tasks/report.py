"""The report of a run: what its artifacts say, gathered for ``fpo_core.report``."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from fpo_core.data.sources.addresses import shown_deep
from fpo_core.evaluation.audit import RATE
from fpo_core.report.model import (
    FeatureShift,
    GroupShift,
    Interval,
    MetricRow,
    RunReport,
    Sample,
    StageRow,
)
from tasks.benchmark import SCORES
from tasks.breakdown import BREAKDOWN
from tasks.plan import kind_of
from tasks.run import Outcome, PipelineRun

log = logging.getLogger("fpo.stage")

SHOWN_FEATURES = 12
HELDOUT = "heldout.parquet"  # of a policy whose training was measured on held-out pairs


def write_report(
    run: PipelineRun, folder: Path, outcomes: Mapping[str, Outcome] | None = None
) -> Path:
    """Render the report of a finished run.

    Args:
        run: the run, whose every stage is complete.
        folder: receives ``report.html`` and ``charts/``.
        outcomes: what became of each stage just now; from the manifests where it is left out.

    Returns:
        The HTML file.
    """
    from fpo_core.report.page import render  # its charts take a second to import

    return render(gather(run, outcomes or {}), folder)


def default_folder(run: PipelineRun) -> Path:
    """Where a recipe's report goes: one folder a recipe and method."""
    return Path("reports") / f"{run.recipe.name}-{run.recipe.train.method}"


def bring_report(run: PipelineRun, folder: str | None, outcomes: Mapping[str, Outcome]) -> Path:
    """Write the report, unless nothing was computed and it is there already; the HTML file."""
    place = Path(folder) if folder else default_folder(run)
    nothing_new = all(outcome.state == "reused" for outcome in outcomes.values())
    if not (nothing_new and is_current(run, place)):
        write_report(run, place, outcomes)
    page = place / "report.html"
    log.info("report     %s", page)
    return page


def is_current(run: PipelineRun, folder: Path) -> bool:
    """Whether the folder's report is of this very evaluation already."""
    page = folder / "report.html"
    planned = run.planned("evaluate")
    mark = f'<meta name="fpo-evaluation" content="{planned.artifact}/{planned.version}">'
    return page.is_file() and mark in page.read_text(encoding="utf-8", errors="replace")


def gather(run: PipelineRun, outcomes: Mapping[str, Outcome]) -> RunReport:
    """Everything the report shows, read from the run's artifacts."""
    evaluation, policy = run.artifact("evaluate"), run.artifact("train")
    watched = HELDOUT in policy.manifest["files"]
    metrics = json.loads(evaluation.path("metrics.json").read_text())
    answers = pl.read_parquet(evaluation.path("answers.parquet")).to_dicts()
    recipe = shown_deep(run.recipe.model_dump(mode="json", exclude_none=True))
    grouped = BREAKDOWN in evaluation.files
    return RunReport(
        recipe_name=run.recipe.name,
        method=run.recipe.train.method,
        title=f"{run.recipe.name}: {run.recipe.train.method.upper()}",
        created=evaluation.manifest["created"],
        git_commit=evaluation.manifest["provenance"].get("git_commit"),
        stages=tuple(_stage(run, stage, outcomes.get(stage)) for stage in run.plan.stages),
        training=pl.read_parquet(policy.path("metrics.parquet")),
        metrics=tuple(_metric(record) for record in metrics),
        features=_features(run),
        groups=_groups(run),
        moved=_moved(run),
        samples=tuple(
            Sample(r["prompt"], r["before"], r["after"], r["before_stop"], r["after_stop"])
            for r in answers
        ),
        recipe_yaml=yaml.safe_dump(recipe, sort_keys=False),
        notes=(),
        evaluation=f"{evaluation.stage}/{evaluation.version}",
        heldout_pairs=evaluation.manifest["stats"]["heldout_pairs"],
        heldout=pl.read_parquet(policy.path(HELDOUT)) if watched else pl.DataFrame(),
        data=run.artifact("tokenize").manifest["stats"],
        breakdown=pl.read_parquet(evaluation.path(BREAKDOWN)) if grouped else pl.DataFrame(),
        benchmarks=tuple(
            record
            for stage in run.plan.stages
            if kind_of(stage) == "benchmark"
            for record in json.loads(run.artifact(stage).path(SCORES).read_text())
        ),
    )


def _stage(run: PipelineRun, stage: str, outcome: Outcome | None) -> StageRow:
    artifact = run.artifact(stage)
    manifest = artifact.manifest
    return StageRow(
        stage,
        f"{artifact.stage}/{artifact.version}",
        outcome.state if outcome else "reused",
        manifest["rows"],
        manifest["bytes"],
        manifest["seconds"],
        dict(manifest["inputs"]),
    )


def _metric(record: dict) -> MetricRow:
    intervals = {
        name: None if record[name] is None else Interval(**record[name])
        for name in ("reference", "policy", "difference")
    }
    assert intervals["policy"] is not None
    return MetricRow(
        record["key"], record["label"], record["description"], record["unit"], record["better"],
        intervals["reference"], intervals["policy"], intervals["difference"],
    )  # fmt: skip


def _features(run: PipelineRun) -> tuple[FeatureShift, ...]:
    moved = pl.read_parquet(run.artifact("evaluate").path("features.parquet"))
    moved = moved.sort(pl.col("change").abs(), descending=True).head(SHOWN_FEATURES)
    return tuple(
        FeatureShift(row["feature"], row["side"], **_shift(row), tokens=tuple(row["tokens"]))
        for row in moved.to_dicts()
    )


def _groups(run: PipelineRun) -> tuple[GroupShift, ...]:
    groups = pl.read_parquet(run.artifact("evaluate").path("groups.parquet"))
    return tuple(
        GroupShift(row["group"], row["size"], row["side"], **_shift(row))
        for row in groups.to_dicts()
    )


def _shift(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ("reference", "policy", "low", "high", "effect")}


def _moved(run: PipelineRun) -> tuple[int, int]:
    audit = pl.read_parquet(run.artifact("evaluate").path("audit.parquet"), columns=["q"])
    return int((audit["q"] < RATE).sum()), audit.height
