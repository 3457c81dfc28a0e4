"""Stage ``reference``: the reference model's log-probs -> the ``reference`` artifact."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.offline import score_shards
from tasks.run import Outcome, PipelineRun, Work


@task(name="reference", task_run_name="reference", cache_policy=NO_CACHE)
def reference(run: PipelineRun, *, with_features: bool) -> Outcome:
    """Score every response with the reference model.

    Args:
        run: the pipeline run.
        with_features: the ``features`` stage comes next in this run; when its artifact is missing
            too, the same forward pass writes its shards.
    """
    return announce(run.bring_about("reference", lambda writer: _score(run, writer, with_features)))


def _score(run: PipelineRun, writer: ArtifactWriter, with_features: bool) -> Work:
    if not with_features:
        return Work({"shared_pass_with_features": False}, score_shards(run, writer, None))
    with run.writer_beside("features") as beside:
        tokens = score_shards(run, writer, beside)
        return Work({"shared_pass_with_features": beside is not None}, tokens)
