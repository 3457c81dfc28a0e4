"""Stage ``sft``: a supervised warm start -> the ``sft`` artifact, which is the reference model."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.recipe.training import OptimizerSettings, TrainSettings
from fpo_core.training.job import TrainingJob
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.run import Outcome, PipelineRun, Work
from tasks.training import Places, check_unchanged, common_fields, run_training
from tasks.transfer import local_shards


@task(name="sft", task_run_name="sft", cache_policy=NO_CACHE)
def sft(run: PipelineRun) -> Outcome:
    """Train the model on the recipe's dialogues: the objective ``sft`` in the same loop."""
    return announce(run.bring_about("sft", lambda writer: _sft(run, writer)))


def _sft(run: PipelineRun, writer: ArtifactWriter) -> Work:
    return run_training(run, "sft", writer, "instructions", lambda places: sft_job(run, places))


def sft_job(run: PipelineRun, places: Places) -> TrainingJob:
    """The job of the warm start: answers alone, with no caches and no SAE."""
    settings = run.recipe.sft
    assert settings is not None
    check_unchanged(run, "instructions")
    shared = settings.model_dump(include=set(OptimizerSettings.model_fields))
    return TrainingJob(
        model_folder=run.base_folder(),
        saes=(),
        settings=TrainSettings(method="sft", **shared),
        pairs=local_shards(run.artifact("instructions")),
        reference=(),
        **common_fields(run, "sft", places),
    )
