"""Stage ``features``: the reference's SAE features -> the ``features`` artifact."""

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.schemas import FEATURES_STATS
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.gate import gate_stats
from tasks.offline import score_shards
from tasks.plan import features_stages
from tasks.run import Outcome, PipelineRun, Work


@task(name="features", task_run_name="{stage}", cache_policy=NO_CACHE)
def features(run: PipelineRun, stage: str = "features") -> Outcome:
    """Cache pooled, token and per-feature tables of the reference's SAE features.

    Args:
        run: the pipeline run.
        stage: ``features``, or ``features@LAYER`` for a further SAE of the recipe.
    """
    return announce(run.bring_about(stage, lambda writer: _extract(run, stage, writer)))


def _extract(run: PipelineRun, stage: str, writer: ArtifactWriter) -> Work:
    from fpo_core.features.stats import merge_stats

    tokens = score_shards(run, None, writer, features_stages(run.recipe).index(stage))
    shards = []
    for _, receipt in sorted(writer.finished_shards().items()):
        table = writer.read_table("shard_stats", receipt)
        columns = {
            name: table[name].to_numpy() for name in table.column_names if name != "examples"
        }
        shards.append({**columns, "examples": table["examples"].to_pylist()})
    merged = merge_stats(shards, run.recipe.features.examples)
    stats = pa.table(merged, schema=FEATURES_STATS)
    writer.put_table("stats", stats)
    density = merged["density"]
    return Work(
        {
            "d_sae": len(density),
            "scored_tokens": sum(int(shard["tokens"][0]) for shard in shards),
            "l0": float(density.sum()),
            "never_active": int((density == 0).sum()),
            **gate_stats(writer),
        },
        tokens,
    )
