"""Stage ``features``: the reference's SAE features -> the ``features`` artifact."""

from collections.abc import Sequence

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.schemas import FEATURES_STATS
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.arrow import to_table
from tasks.offline import score_shards
from tasks.run import Outcome, PipelineRun, Work


@task(name="features", task_run_name="{stage}", cache_policy=NO_CACHE)
def features(run: PipelineRun, stage: str = "features", beside: Sequence[str] = ()) -> Outcome:
    """Cache pooled, token and per-feature tables of the reference's SAE features.

    Args:
        run: the pipeline run.
        stage: ``features``, or ``features@LAYER`` for a further SAE of the recipe.
        beside: such stages that come next in this run; the same forward pass writes the shards of
            those whose artifacts are missing too.
    """
    return announce(run.bring_about(stage, lambda writer: _extract(run, stage, writer, beside)))


def _extract(
    run: PipelineRun, stage: str, writer: ArtifactWriter, beside: Sequence[str]
) -> Work:  # fmt: skip
    with run.writers_beside(beside) as others:
        tokens = score_shards(run, {stage: writer, **others})
    return Work(merge_statistics(writer, run.recipe.features.examples), tokens)


def merge_statistics(writer: ArtifactWriter, examples: int) -> dict[str, object]:
    """Write the statistics of all shards, and say what they come to."""
    from fpo_core.features.stats import StatsMerge

    merge: StatsMerge | None = None
    for _, receipt in sorted(writer.finished_shards().items()):
        shard = writer.read_table("shard_stats", receipt)
        merge = merge or StatsMerge(shard.num_rows, examples)
        pair_ids = writer.read_table("pooled", receipt, ["pair_id"])["pair_id"]
        merge.add(_columns(shard), pair_ids.to_numpy(zero_copy_only=False)[::2])
    assert merge is not None, "an artifact without shards"
    columns = merge.columns()
    writer.put_table("stats", to_table(columns, FEATURES_STATS))
    density = columns["density"]
    return {
        "d_sae": len(density),
        "scored_tokens": merge.tokens,
        "l0": float(density.sum()),
        "never_active": int((density == 0).sum()),
        "dropped": merge.dropped(),
    }


def _columns(table: pa.Table) -> dict[str, object]:
    from fpo_core.lists import lists_of

    return {
        field.name: lists_of(table, field.name)
        if pa.types.is_list(field.type)
        else table[field.name].to_numpy()
        for field in table.schema
    }
