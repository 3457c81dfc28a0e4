"""Stage ``train``: preference optimization in worker processes -> the ``policy`` artifact."""

import logging
import shutil
from pathlib import Path
from typing import Any

import polars as pl
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.errors import FPOError
from fpo_core.models.load import load_tokenizer
from fpo_core.progress import Progress
from fpo_core.recipe.options import objective_options
from fpo_core.training.job import MODEL_FOLDER, TrainingJob
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.offline import sae_path
from tasks.run import Outcome, PipelineRun, Work
from tasks.transfer import bytes_progress, local_shards

log = logging.getLogger("fpo.stage")


@task(name="train", task_run_name="train", cache_policy=NO_CACHE)
def train(run: PipelineRun) -> Outcome:
    """Train the policy from the cached reference side; no reference model in memory."""
    return announce(run.bring_about("train", lambda writer: _train(run, writer)))


def _train(run: PipelineRun, writer: ArtifactWriter) -> Work:
    from fpo_core.training.launch import run_workers

    output = writer.scratch() / "attempt"
    shutil.rmtree(output, ignore_errors=True)
    job = training_job(run, output)
    records: list[dict[str, Any]] = []
    with Progress("train", total=_total_steps(run), unit="step") as progress:

        def on_step(record: dict[str, Any]) -> None:
            records.append(record)
            note = f"loss {record['loss']:.3f}, accuracy {record['accuracy']:.2f}"
            progress.advance(1, note)

        run_workers(job, run.recipe.resources.ranks, on_step)
    model = output / MODEL_FOLDER
    load_tokenizer(job.model_folder).save_pretrained(model)
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
        "missing_features_per_pair": sum(r["missing"] for r in records) / len(records),
    }
    tokens = sum(record["tokens_per_second"] * record["seconds"] for record in records)
    return Work(stats, int(tokens))


def training_job(run: PipelineRun, output: Path) -> TrainingJob:
    """The job of a run: local, verified paths of every input."""
    pairs, caches, features = (run.artifact(s) for s in ("tokenize", "reference", "features"))
    if run.recipe.train.k > features.manifest["stats"]["d_sae"]:
        raise FPOError(
            f"train.k={run.recipe.train.k}, but the SAE has only "
            f"{features.manifest['stats']['d_sae']} features"
        )
    return TrainingJob(
        model_folder=run.model_path(),
        attention=run.recipe.model.attention,
        sae_folder=sae_path(run),
        layer=run.recipe.sae.layer,
        settings=run.recipe.train,
        pairs=local_shards(pairs),
        reference=local_shards(caches),
        pooled=local_shards(features, "pooled"),
        reference_dtype=run.recipe.model.dtype,
        tokens_per_batch=run.recipe.resources.tokens_per_batch,
        threads=run.recipe.resources.threads,
        output=output,
    )


def _total_steps(run: PipelineRun) -> int:
    from fpo_core.training.examples import num_steps

    pairs = run.artifact("tokenize").manifest["stats"]["pairs"]["train"]
    return num_steps(pairs, run.recipe.train.batch_size, run.recipe.train.epochs)
