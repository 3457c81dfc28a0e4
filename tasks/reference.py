"""Stage ``reference``: the reference model's log-probs -> the ``reference`` artifact."""

from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.offline import score_shards
from tasks.run import Outcome, PipelineRun, Work


@task(name="reference", task_run_name="reference", cache_policy=NO_CACHE)
def reference(run: PipelineRun, beside: Sequence[str] = ()) -> Outcome:
    """Score every response with the reference model.

    Args:
        run: the pipeline run.
        beside: the features' stages that come next in this run; the same forward pass writes the
            shards of those whose artifacts are missing too.
    """
    return announce(run.bring_about("reference", lambda writer: _score(run, writer, beside)))


def _score(run: PipelineRun, writer: ArtifactWriter, beside: Sequence[str]) -> Work:
    with run.writers_beside(beside) as others:
        tokens = score_shards(run, {"reference": writer, **others})
        return Work({"shared_pass_with": sorted(others)}, tokens)
