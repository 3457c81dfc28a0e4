"""The offline pass behind the ``reference`` and ``features`` stages.

When both are missing, one forward pass a shard feeds both: the ``reference`` stage also writes
the features' shards, and the ``features`` stage, which comes next, finds their receipts and only
has to merge the statistics and commit. Both stay separately versioned and resumable.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from fpo_core.errors import FPOError
from fpo_core.models.load import load_model, prepare_cpu
from fpo_core.progress import Progress
from fpo_core.sae.source import sae_folder
from storage.schemas import (
    FEATURES_POOLED,
    FEATURES_SHARD_STATS,
    FEATURES_TOKENS,
    REFERENCE,
)
from storage.writer import ArtifactWriter
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
    run: PipelineRun, reference: ArtifactWriter | None, features: ArtifactWriter | None
) -> int:
    """Compute and write the missing shards of one artifact or of both.

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
        run.model_path(), dtype=run.recipe.model.dtype, attention=run.recipe.model.attention
    )
    coder = attached_coder(run, model) if features else None
    shards = {work.shard: read_pair_ids(pairs.table(shard=work.shard)) for work in todo}
    total = sum(pair.length for ids in shards.values() for pair in ids)
    label = " + ".join(n for n, w in (("reference", reference), ("features", features)) if w)
    with Progress(label, total=total, unit="token") as progress:
        for work in todo:
            scores = score_shard(
                model, shards[work.shard], run.recipe.sae.layer,
                coder=coder if work.features else None, features=run.recipe.features,
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


def sae_path(run: PipelineRun) -> Path:
    """The folder of the recipe's SAE: a stored one, or what the ``sae`` stage made."""
    if run.recipe.sae.train is not None:
        return run.artifact("sae").folder("sae")
    assert run.recipe.sae.source is not None
    return sae_folder(run.recipe.sae.source)


def attached_coder(run: PipelineRun, model: Any) -> "SparseCoder":
    """The SAE, checked against the model it is to read.

    Raises:
        FPOError: when it does not fit the model, or is too small for the recipe's k.
    """
    from fpo_core.models.hooks import decoder_layers
    from fpo_core.sae.coder import check_fits, load_coder

    name = run.recipe.sae.source or "trained by this recipe"
    coder = load_coder(sae_path(run))
    layers = len(decoder_layers(model))
    check_fits(coder, model.config.hidden_size, run.recipe.sae.layer, layers, name)
    for key, k in (
        ("train.k", run.recipe.train.k),
        ("features.tokens_k", run.recipe.features.tokens_k),
    ):
        if k > coder.d_sae:
            raise FPOError(f"{key}={k}, but the SAE {name} has only {coder.d_sae} features")
    return coder
