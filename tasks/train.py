"""Stage ``train``: preference optimization in worker processes -> the ``policy`` artifact."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.recipe.options import objective_options
from fpo_core.training.job import JobSae, TrainingJob
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.offline import sae_path
from tasks.plan import features_stages
from tasks.run import Outcome, PipelineRun, Work
from tasks.training import Places, check_unchanged, common_fields, run_training
from tasks.transfer import local_shards


@task(name="train", task_run_name="train", cache_policy=NO_CACHE)
def train(run: PipelineRun) -> Outcome:
    """Train the policy from the cached reference side; no reference model in memory."""
    return announce(run.bring_about("train", lambda writer: _train(run, writer)))


def _train(run: PipelineRun, writer: ArtifactWriter) -> Work:
    work = run_training(
        run, "train", writer, "tokenize", lambda places: training_job(run, places)
    )  # fmt: skip
    work.stats["beta"] = objective_options(run.recipe.train).beta
    return work


def training_job(run: PipelineRun, places: Places) -> TrainingJob:
    """The job of a run: local, verified paths of every input.

    Args:
        run: the pipeline run.
        places: where the workers write.
    """
    pairs, caches = run.artifact("tokenize"), run.artifact("reference")
    check_unchanged(run, "tokenize")
    saes = []
    for number, stage in enumerate(features_stages(run.recipe)):
        features, folder = run.artifact(stage), sae_path(run, number)
        check_unchanged(run, stage, folder)
        tokens = () if run.recipe.train.pooled else local_shards(features, "tokens")
        saes.append(
            JobSae(
                folder=folder, hookpoint=run.recipe.hookpoints[number],
                pooled=local_shards(features, "pooled"), tokens=tokens,
            )
        )  # fmt: skip
    return TrainingJob(
        model_folder=run.reference_folder(),
        saes=tuple(saes),
        settings=run.recipe.train,
        pairs=local_shards(pairs),
        reference=local_shards(caches),
        monitor=run.recipe.monitor if run.recipe.monitor.heldout_steps else None,
        **common_fields(run, "train", places),
    )
