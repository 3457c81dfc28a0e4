"""The gate of the ``features`` stage: an SAE is measured where it is to read, before it reads.

What was measured is kept with the artifact in the making, where a run that goes on finds it, and
so does the ``features`` stage after a pass of ``reference`` that fed both.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_core.errors import FPOError
from fpo_core.progress import Progress
from storage.artifact import Artifact
from storage.writer import ArtifactWriter
from tasks.run import PipelineRun

if TYPE_CHECKING:
    from fpo_core.sae.coder import SparseCoder

log = logging.getLogger("fpo.stage")

GATE = "gate"  # the checkpoint's name, and the key in the manifest's statistics
GATE_FILE = "gate.json"


def gate_sae(
    run: PipelineRun,
    writer: ArtifactWriter,
    model: Any,
    coder: "SparseCoder",
    sae: int,
    place: Path,
) -> None:
    """Measure one of the recipe's SAEs on the pairs, and refuse one that is not in its place.

    Args:
        run: the pipeline run.
        writer: of its features.
        model: the model that it reads.
        coder: the SAE with its decoder, on the model's device.
        sae: which of the recipe's.
        place: its files.

    Raises:
        FPOError: it is not in its place; with the figures and the likely cause.
    """
    record = _saved(writer)
    measured = record is None
    if record is None:
        record = measure_gate(run, model, coder, sae, place)
    log.info("%s", record["line"])
    for warning in record["warnings"]:
        log.warning("SAE at %s: %s", record["place"], warning)
    if record["cause"]:
        told = f"SAE {sae_name(run, sae)} is not in its place: {record['cause']}"
        if not is_only_told(run, sae):
            raise FPOError(f"{told}. {record['line']}. To use it as it is: sae.gate=warn")
        log.warning("%s", told)
    if measured:
        file = writer.scratch() / GATE_FILE
        file.write_text(json.dumps(record))
        writer.checkpoints().put(GATE, [file])


def is_gated(writer: ArtifactWriter) -> bool:
    """Whether an earlier attempt measured the SAE of this artifact."""
    return _saved(writer) is not None


def gate_stats(writer: ArtifactWriter) -> dict[str, Any]:
    """What the gate measured, for the manifest; nothing where it did not run."""
    record = _saved(writer)
    return {} if record is None else {GATE: record}


def measure_gate(
    run: PipelineRun,
    model: Any,
    coder: "SparseCoder",
    sae: int,
    place: Path,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Measure one of the recipe's SAEs on the first tokens of the pairs.

    Args:
        run: the pipeline run, whose pairs are there.
        model: the model that it reads.
        coder: the SAE with its decoder, on the model's device.
        sae: which of the recipe's.
        place: its files.
        tokens: how many; None: as the stage takes.

    Raises:
        FPOError: the pairs are of another tokenizer.
    """
    from fpo_core.logprobs import output_head
    from fpo_core.sae import gate
    from fpo_core.sae.quality import measure_sae

    hookpoint = run.recipe.hookpoints[sae]
    texts = _texts(run.artifact("tokenize"), len(output_head(model).weight))
    rows = gate.sample_rows(texts, tokens or gate.TOKENS)
    spliced = gate.spliced_rows(rows)
    total = sum(len(row) - 1 for row in rows) + 2 * sum(len(row) - 1 for row in rows[:spliced])
    with Progress("SAE gate", total=total, unit="token") as progress:
        fit = measure_sae(
            model, coder, hookpoint, rows,
            spliced=spliced, beside=gate.other_places(model, hookpoint), sample=gate.SAMPLE,
            tokens_per_batch=run.recipe.resources.tokens_per_batch, on_tokens=progress.advance,
        )  # fmt: skip
    declared = gate.declared_quality(place)
    verdict = gate.judge(fit, hookpoint, declared, "sae" if sae == 0 else f"sae.also[{sae - 1}]")
    return gate.gate_record(fit, hookpoint, declared, verdict)


def sae_name(run: PipelineRun, sae: int) -> str:
    """An SAE of the recipe, as messages name it."""
    settings = run.recipe.sae
    source = settings.source if sae == 0 else settings.also[sae - 1].source
    return source or "trained by this recipe"


def is_only_told(run: PipelineRun, sae: int) -> bool:
    """Whether an SAE that is not in its place is used all the same."""
    asked_for_by_name = run.recipe.hookpoints[sae].site == "final_norm"
    return asked_for_by_name or run.recipe.sae.gate == "warn"


def _saved(writer: ArtifactWriter) -> dict[str, Any] | None:
    saved = writer.checkpoints().newest()
    return None if saved is None else json.loads((saved.folder / GATE_FILE).read_text())


def _texts(pairs: Artifact, vocabulary: int) -> Iterator[list[int]]:
    """Prompt and chosen response of each pair."""
    from fpo_core.data.batches import PairIds, check_vocabulary

    for shard in range(pairs.num_shards()):
        table = pairs.table(shard=shard).select(["pair_id", "prompt_ids", "chosen_ids"])
        for pair_id, prompt, chosen in zip(*table.to_pydict().values(), strict=True):
            check_vocabulary([PairIds(pair_id, prompt, chosen, ())], vocabulary)
            yield prompt + chosen
