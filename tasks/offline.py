"""The offline pass behind the ``reference`` and ``features`` stages.

When both are missing, one forward pass a shard feeds both: the ``reference`` stage also writes
the features' shards, and the ``features`` stage, which comes next, finds their receipts and only
has to merge the statistics and commit. Both stay separately versioned and resumable.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from fpo_core.models.load import inference_device, load_model, prepare_cpu
from fpo_core.progress import Progress
from fpo_core.sae.source import sae_folder
from storage.schemas import (
    FEATURES_POOLED,
    FEATURES_SHARD_STATS,
    FEATURES_TOKENS,
    REFERENCE,
)
from storage.writer import ArtifactWriter
from tasks.gate import gate_sae
from tasks.run import PipelineRun

if TYPE_CHECKING:
    from fpo_core.data.batches import PairIds
    from fpo_core.offline import ShardScores
    from fpo_core.sae.coder import SparseCoder

log = logging.getLogger("fpo.stage")


class Todo(NamedTuple):
    """What of one shard is missing."""

    shard: int
    reference: bool
    features: bool


def score_shards(
    run: PipelineRun,
    reference: ArtifactWriter | None,
    features: ArtifactWriter | None,
    sae: int = 0,
) -> int:
    """Compute and write the missing shards of one artifact or of both.

    Args:
        run: the pipeline run.
        reference: the log-probs' artifact, where it is wanted.
        features: the features' artifact, where it is wanted.
        sae: which of the recipe's SAEs the features are of.

    Returns:
        Tokens processed.
    """
    from fpo_core.offline import score_shard

    pairs = run.artifact("tokenize")
    todo = _missing(pairs.num_shards(), reference, features)
    if not todo:
        return 0
    prepare_cpu(run.recipe.resources.threads)
    model = load_model(
        run.reference_folder(), dtype=run.recipe.model.dtype, attention=run.recipe.model.attention,
        device=inference_device(),
    )  # fmt: skip
    # All of them: one that does not fit is told before the first hour, not before its own.
    coders = [attached_coder(run, model, n) for n in range(len(run.recipe.hookpoints))]
    coder = coders[sae].to(str(model.device)) if features else None
    if features and coder:
        gate_sae(run, features, model, coder, sae, sae_path(run, sae))
    pinned = run.recipe.train.pinned if sae == 0 else ()
    shards = {work.shard: read_pair_ids(pairs.table(shard=work.shard)) for work in todo}
    total = sum(pair.length for ids in shards.values() for pair in ids)
    label = " + ".join(n for n, w in (("reference", reference), ("features", features)) if w)
    with Progress(label, total=total, unit="token") as progress:
        for work in todo:
            scores = score_shard(
                model, shards[work.shard], run.recipe.hookpoints[sae],
                coder=coder if work.features else None, features=run.recipe.features,
                pinned=pinned,
                want_reference=work.reference,
                tokens_per_batch=run.recipe.resources.tokens_per_batch,
                on_tokens=progress.advance,
            )  # fmt: skip
            _write(work.shard, scores, reference, features)
    return total


def _missing(
    shards: int, reference: ArtifactWriter | None, features: ArtifactWriter | None
) -> list[Todo]:
    done = [set(writer.finished_shards()) if writer else None for writer in (reference, features)]
    every = (
        Todo(shard, *(finished is not None and shard not in finished for finished in done))
        for shard in range(shards)
    )
    return [work for work in every if work.reference or work.features]


def _write(
    shard: int,
    scores: "ShardScores",
    reference: ArtifactWriter | None,
    features: ArtifactWriter | None,
) -> None:
    if reference and scores.reference is not None:
        reference.put_shard(shard, {"": pa.table(scores.reference, schema=REFERENCE)})
    if features and scores.pooled is not None:
        tables = {
            "pooled": pa.table(scores.pooled, schema=FEATURES_POOLED),
            "tokens": pa.table(scores.tokens, schema=FEATURES_TOKENS),
            "shard_stats": pa.table(scores.stats, schema=FEATURES_SHARD_STATS),
        }
        features.put_shard(shard, tables)


def read_pair_ids(table: pa.Table) -> list["PairIds"]:
    """A shard of ``pairs`` as token ids."""
    from fpo_core.data.batches import PairIds

    return [
        PairIds(row["pair_id"], row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
        for row in table.to_pylist()
    ]


def sae_path(run: PipelineRun, sae: int = 0) -> Path:
    """The folder of one of the recipe's SAEs: a stored one, or what the ``sae`` stage made."""
    source = _sae_source(run, sae)
    return run.artifact("sae").folder("sae") if source is None else sae_folder(source)


def _sae_source(run: PipelineRun, sae: int) -> str | None:
    settings = run.recipe.sae
    return settings.source if sae == 0 else settings.also[sae - 1].source


def attached_coder(run: PipelineRun, model: Any, sae: int = 0) -> "SparseCoder":
    """One of the recipe's SAEs, checked against the model it is to read.

    Raises:
        FPOError: when it does not fit the model.
    """
    from fpo_core.models.load import load_tokenizer
    from fpo_core.sae.coder import check_bos, check_fits, load_coder

    coder = load_coder(sae_path(run, sae))
    name = _sae_source(run, sae) or "trained by this recipe"
    check_fits(coder, model, run.recipe.hookpoints[sae], name)
    prompt = run.artifact("tokenize").table(shard=0)["prompt_ids"][0].as_py()
    check_bos(coder, prompt, load_tokenizer(run.reference_folder()).bos_token_id, name)
    return coder
