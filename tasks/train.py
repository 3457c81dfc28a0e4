"""Stage ``train``: preference optimization in worker processes -> the ``policy`` artifact."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.errors import FPOError
from fpo_core.models.load import load_tokenizer
from fpo_core.models.source import identify
from fpo_core.progress import Progress
from fpo_core.recipe.options import objective_options
from fpo_core.sae.source import identify_sae
from fpo_core.training.job import BAD_BATCH_FILE, MODEL_FOLDER, RANK_LOG, JobSae, TrainingJob
from storage.errors import StoreError
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.checkpoints import CheckpointKeeper
from tasks.offline import sae_path
from tasks.plan import features_stages
from tasks.run import Outcome, PipelineRun, Work
from tasks.transfer import bytes_progress, local_shards

log = logging.getLogger("fpo.stage")


@task(name="train", task_run_name="train", cache_policy=NO_CACHE)
def train(run: PipelineRun) -> Outcome:
    """Train the policy from the cached reference side; no reference model in memory."""
    return announce(run.bring_about("train", lambda writer: _train(run, writer)))


def _train(run: PipelineRun, writer: ArtifactWriter) -> Work:
    from fpo_core.training.checkpoint import read_meta
    from fpo_core.training.hosts import run_hosts
    from fpo_core.training.launch import run_workers
    from fpo_core.training.saved import check_saved

    started = time.monotonic()
    hosts = run_hosts(run.recipe.resources)
    output = writer.scratch() / "attempt"
    shutil.rmtree(output, ignore_errors=True)
    keeper = CheckpointKeeper(writer, run.recipe.resources.checkpoints_kept)
    saved = keeper.newest()
    earlier = read_meta(saved.folder).step if saved else 0  # steps that are done already
    job = training_job(run, output, keeper.local, resume=saved.folder if saved else None)
    if saved:
        log.info("train: going on from %s", saved.name)
    records: list[dict[str, Any]] = []
    to_first_step = 0.0
    progress = Progress("train", total=_total_steps(run), unit="step", done=earlier)
    with progress, keeper:

        def on_step(record: dict[str, Any]) -> None:
            nonlocal to_first_step
            records.append(record)
            if record["step"] <= earlier:
                return
            if record["step"] == earlier + 1:
                to_first_step = time.monotonic() - started - record["seconds"]
                log.info("train: the first step began after %.1f s", to_first_step)
            note = f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.2f}"
            progress.advance(1, note)

        try:
            ranks = hosts.ranks if hosts else run.recipe.resources.ranks or 1
            run_workers(job, ranks, on_step, keeper.keep, hosts)
        except FPOError as error:
            raise _with_kept_files(run, output, error) from error
        finally:
            _keep(run, output, RANK_LOG.format(rank="*"))
    model = output / MODEL_FOLDER
    check_saved(output, job.attention)
    load_tokenizer(job.model_folder).save_pretrained(model)
    (model / "README.md").write_text(model_card(run, records[-1]))
    files = sorted(model.iterdir())
    with bytes_progress("storing the policy", sum(path.stat().st_size for path in files)) as done:
        for path in files:
            writer.put_file(f"model/{path.name}", path, done)
    metrics = output / "metrics.parquet"
    pl.DataFrame(records).write_parquet(metrics)
    writer.put_file("metrics.parquet", metrics)
    last = records[-1]
    stats = {
        "steps": last["steps"],
        "beta": objective_options(job.settings).beta,
        "first_loss": records[0]["loss"],
        "last_loss": last["loss"],
        "seconds_to_first_step": to_first_step,
        "missing_features_per_pair": sum(r["missing"] for r in records) / len(records),
    }
    tokens = sum(r["tokens_per_second"] * r["seconds"] for r in records[earlier:])
    return Work(stats, int(tokens))


def model_card(run: PipelineRun, last: dict[str, Any]) -> str:
    """The policy's README: what it was made by, from and with what result.

    It names no path and no time, so that the same run gives the same bytes.
    """
    planned = run.planned("train")
    settings = yaml.safe_dump(planned.recipe, sort_keys=True)
    inputs = "\n".join(f"| {name} | `{version}` |" for name, version in planned.inputs.items())
    shown = ("loss", "accuracy", "margin", "discrepancy_chosen", "discrepancy_rejected")
    metrics = "\n".join(f"| {name} | {last[name]:.4g} |" for name in shown)
    return f"""---
library_name: transformers
tags: [preference-optimization, {run.recipe.train.method}]
---

# {run.recipe.name}: {run.recipe.train.method.upper()}

A policy trained by the FPO pipeline, artifact `policy/{planned.version}`.

| made from | |
|---|---|
{inputs}

| at the last step, {last["step"]} | |
|---|---|
{metrics}

Settings of the training:

```yaml
{settings}```
"""


def training_job(
    run: PipelineRun, output: Path, checkpoints: Path, resume: Path | None = None
) -> TrainingJob:
    """The job of a run: local, verified paths of every input.

    Args:
        run: the pipeline run.
        output: where the workers write.
        checkpoints: where they write checkpoints.
        resume: a checkpoint to go on from.
    """
    pairs, caches = run.artifact("tokenize"), run.artifact("reference")
    _check_unchanged(run, "tokenize")
    saes = []
    for number, stage in enumerate(features_stages(run.recipe)):
        features, folder = run.artifact(stage), sae_path(run, number)
        _check_unchanged(run, stage, folder)
        tokens = () if run.recipe.train.pooled else local_shards(features, "tokens")
        saes.append(
            JobSae(
                folder=folder, hookpoint=run.recipe.hookpoints[number],
                pooled=local_shards(features, "pooled"), tokens=tokens,
            )
        )  # fmt: skip
    return TrainingJob(
        model_folder=run.model_path(),
        attention=run.recipe.model.attention,
        saes=tuple(saes),
        settings=run.recipe.train,
        pairs=local_shards(pairs),
        reference=local_shards(caches),
        reference_dtype=run.recipe.model.dtype,
        tokens_per_batch=run.recipe.resources.tokens_per_batch,
        threads=run.recipe.resources.threads,
        offload=run.recipe.resources.offload,
        output=output,
        version=run.planned("train").version,
        checkpoints=checkpoints,
        checkpoint_minutes=run.recipe.resources.checkpoint_minutes,
        resume=resume,
    )


def _check_unchanged(run: PipelineRun, stage: str, sae: Path | None = None) -> None:
    """Refuse a model or SAE whose files are not those any more that a cache was made with.

    Raises:
        FPOError: naming the cache, what it was made with and what is there now.
    """
    inputs = run.planned(stage).inputs
    model = identify(run.recipe.model.source, run.recipe.model.revision)
    now = {} if model.commit else {"model": model.value}  # a commit's files do not change
    if sae and not inputs["sae"].startswith("artifact:"):
        now["sae"] = identify_sae(str(sae)).value
    for name, value in now.items():
        if inputs[name] != value:
            raise FPOError(
                f"`{stage}` was made with the {name} {inputs[name]}, and the {name}'s files are "
                f"{value} now: they changed during this run. Run the same command again"
            )


def _with_kept_files(run: PipelineRun, output: Path, error: FPOError) -> FPOError:
    """The error, with where in the store the batches are that the workers kept."""
    kept = _keep(run, output, BAD_BATCH_FILE.format(step="*", rank="*"))
    if not kept:
        return error
    return type(error)(f"{error} (in the store: {', '.join(kept)})")


def _keep(run: PipelineRun, output: Path, pattern: str) -> list[str]:
    """Keep files of the workers with the run's record; returns their keys."""
    kept = []
    for path in sorted(output.glob(pattern)):
        try:
            kept.append(run.keep_file(path))
        except StoreError as error:  # what ended the training is the error to tell
            log.warning("%s could not be kept: %s", path.name, error)
    return kept


def _total_steps(run: PipelineRun) -> int:
    from fpo_core.training.examples import num_steps

    pairs = run.artifact("tokenize").manifest["stats"]["pairs"]["train"]
    return num_steps(pairs, run.recipe.train.batch_size, run.recipe.train.epochs)
