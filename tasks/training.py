"""What the training stages share: watched workers, checkpoints, the policy in the store."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import yaml

from fpo_core.errors import FPOError
from fpo_core.models.load import load_tokenizer
from fpo_core.models.source import identify
from fpo_core.progress import Progress
from fpo_core.sae.source import identify_sae
from fpo_core.tracking import EVENT_FILE, TensorBoard, Tracker, wandb_run
from fpo_core.training.job import BAD_BATCH_FILE, MODEL_FOLDER, RANK_LOG, TrainingJob
from storage.errors import StoreError
from storage.writer import ArtifactWriter
from tasks.checkpoints import CheckpointKeeper
from tasks.run import PipelineRun, Work
from tasks.transfer import bytes_progress

log = logging.getLogger("fpo.stage")
TENSORBOARD_FOLDER = "tensorboard"

# What the model card shows of the last step, where it was measured.
SHOWN = ("loss", "accuracy", "margin", "discrepancy_chosen", "discrepancy_rejected")


class Places(NamedTuple):
    """Where a training run's workers write, and what they go on from."""

    output: Path
    checkpoints: Path
    resume: Path | None = None


def common_fields(run: PipelineRun, stage: str, places: Places) -> dict[str, Any]:
    """What the jobs of both training stages have alike, by the names of ``TrainingJob``."""
    resources, planned = run.recipe.resources, run.planned(stage)
    return {
        "attention": run.recipe.model.attention,
        "reference_dtype": run.recipe.model.dtype,
        "tokens_per_batch": resources.tokens_per_batch,
        "threads": resources.threads,
        "offload": resources.offload,
        "checkpoint_minutes": resources.checkpoint_minutes,
        "version": planned.version,
        "made_from": planned.made_of,
        **places._asdict(),
    }


def run_training(
    run: PipelineRun,
    stage: str,
    writer: ArtifactWriter,
    pairs: str,
    make_job: Callable[[Places], TrainingJob],
) -> Work:
    """Train in worker processes and put the model, its card and the metrics into the artifact.

    Args:
        run: the pipeline run.
        stage: ``train`` or ``sft``.
        writer: of the stage's artifact.
        pairs: the stage whose artifact's training split is trained on.
        make_job: the job, with local files.

    Raises:
        FPOError: the workers' own; with the place of the batches they kept, where they kept any.
    """
    from fpo_core.training.checkpoint import read_meta
    from fpo_core.training.heldout import heldout_line, read_records
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
    job = make_job(Places(output, keeper.local, saved.folder if saved else None))
    if saved:
        log.info("%s: going on from %s", stage, saved.name)
    records: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    known = len(read_records(job))  # held-out records that come again
    to_first_step = 0.0
    progress = Progress(stage, total=_total_steps(run, pairs, job), unit="step", done=earlier)
    with progress, keeper, _trackers(run, stage, job) as trackers:

        def on_step(record: dict[str, Any]) -> None:
            nonlocal to_first_step
            records.append(record)
            for tracker in trackers:
                tracker.log("train", record)
            if record["step"] <= earlier:
                return
            if record["step"] == earlier + 1:
                to_first_step = time.monotonic() - started - record["seconds"]
                log.info("%s: the first step began after %.1f s", stage, to_first_step)
            progress.advance(1, _note(record, heldout))

        def on_heldout(record: dict[str, Any]) -> None:
            heldout.append(record)
            for tracker in trackers:
                tracker.log("heldout", record)
            if len(heldout) > known:
                log.info("%s: %s", stage, heldout_line(record))

        try:
            ranks = hosts.ranks if hosts else run.recipe.resources.ranks or 1
            run_workers(job, ranks, on_step, keeper.keep, on_heldout, hosts)
        except FPOError as error:
            raise _with_kept_files(run, output, error) from error
        finally:
            _keep(run, output, RANK_LOG.format(rank="*"))
    model = output / MODEL_FOLDER
    check_saved(output, job.attention)
    load_tokenizer(job.model_folder).save_pretrained(model)
    (model / "README.md").write_text(model_card(run, stage, records[-1]))
    files = sorted(model.iterdir())
    with bytes_progress("storing the policy", sum(path.stat().st_size for path in files)) as done:
        for path in files:
            writer.put_file(f"model/{path.name}", path, done)
    for name, table in (("metrics", records), ("heldout", heldout)):
        if table:
            path = output / f"{name}.parquet"
            pl.DataFrame(table, infer_schema_length=None).write_parquet(path)
            writer.put_file(path.name, path)
    for path in (output / TENSORBOARD_FOLDER).glob("*tfevents*"):
        writer.put_file(f"{TENSORBOARD_FOLDER}/{EVENT_FILE}", path)
    stats = {
        "steps": records[-1]["steps"],
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "seconds_to_first_step": to_first_step,
    }
    if "missing" in records[0]:
        missing = sum(record["missing"] for record in records) / len(records)
        stats["missing_features_per_pair"] = missing
    tokens = sum(r["tokens_per_second"] * r["seconds"] for r in records[earlier:])
    return Work(stats, int(tokens))


@contextmanager
def _trackers(run: PipelineRun, stage: str, job: TrainingJob) -> Iterator[list[Tracker]]:
    """Who follows the training, as the recipe asks for it."""
    monitor, method = run.recipe.monitor, job.settings.method
    settings = job.settings.model_dump(mode="json")
    trackers: list[Tracker] = []
    with ExitStack() as stack:
        sent = stack.enter_context(
            wandb_run(monitor.wandb, f"{run.recipe.name}-{method}", job.version, settings)
        )
        if sent:
            trackers.append(sent)
        if monitor.tensorboard:
            folder = job.output / TENSORBOARD_FOLDER
            trackers.append(stack.enter_context(closing(TensorBoard(folder))))
            log.info("%s: follow it with `tensorboard --logdir %s`", stage, folder)
        yield trackers


def _note(record: dict[str, Any], heldout: list[dict[str, Any]]) -> str:
    note = f"loss {record['loss']:.3f}"
    if "accuracy" in record:
        note += f", accuracy {record['accuracy']:.2f}"
    return f"{note} (held-out {heldout[-1]['accuracy']:.2f})" if heldout else note


def model_card(run: PipelineRun, stage: str, last: dict[str, Any]) -> str:
    """The model's README: what it was made by, from and with what result.

    It names no path and no time, so that the same run gives the same bytes.
    """
    planned = run.planned(stage)
    method = planned.recipe["method"] if stage == "train" else "sft"
    kind = "supervised-fine-tuning" if stage == "sft" else "preference-optimization"
    settings = yaml.safe_dump(planned.recipe, sort_keys=True)
    inputs = "\n".join(f"| {name} | `{version}` |" for name, version in planned.inputs.items())
    metrics = "\n".join(f"| {name} | {last[name]:.4g} |" for name in SHOWN if name in last)
    return f"""---
library_name: transformers
tags: [{kind}, {method}]
---

# {run.recipe.name}: {method.upper()}

A policy trained by the FPO pipeline, artifact `{planned.name}`.

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


def check_unchanged(run: PipelineRun, stage: str, sae: Path | None = None) -> None:
    """Refuse a model or SAE whose files are not those any more that a stage was planned with.

    Raises:
        FPOError: naming the stage, what it was made with and what is there now.
    """
    inputs = run.planned(stage).inputs
    now = {}
    if not inputs["model"].startswith("artifact:"):
        model = identify(run.recipe.model.source, run.recipe.model.revision)
        if not model.commit:  # a commit's files do not change
            now["model"] = model.value
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


def _total_steps(run: PipelineRun, pairs: str, job: TrainingJob) -> int:
    from fpo_core.training.order import num_steps

    count = run.artifact(pairs).manifest["stats"]["pairs"]["train"]
    return num_steps(count, job.settings.batch_size, job.settings.epochs)
