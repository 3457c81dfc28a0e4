"""Features of a domain, from texts that have it and texts that do not (the paper's Section 5.3).

A feature is a candidate where it is among the strongest at single tokens of the positive texts and
not of the negative ones; it is kept where its average activation says the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from explorer.errors import NotReadable
from fpo_core.errors import UsageError
from tasks.offline import sae_path
from tasks.run import PipelineRun

STRONGEST = 8  # features of a token that count as its own
LONGEST = 512  # tokens of a text that are read
BATCH_TOKENS = 2048


def read_texts(path: Path) -> list[str]:
    """Texts of a file: a line each, or of JSONL the field ``text``.

    Raises:
        NotReadable: no such file, or a line of JSONL without ``text``; it is named.
        UsageError: there is no text in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NotReadable(f"{path.name}: cannot be read as text ({error})") from error
    texts = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if path.suffix == ".jsonl" and text:
            try:
                text = str(json.loads(text)["text"]).strip()
            except (ValueError, KeyError, TypeError) as error:
                raise NotReadable(f"{path.name}, line {number}: no JSON with `text`") from error
        if text:
            texts.append(text)
    if not texts:
        raise UsageError(f"{path.name} has no texts")
    return texts


def find_features(
    run: PipelineRun, positive: Sequence[str], negative: Sequence[str]
) -> pl.DataFrame:
    """Features by how much more they are of the positive texts than of the negative ones.

    Args:
        run: of a recipe, whose reference model and first SAE are read.
        positive: texts of the domain.
        negative: texts like them without it.

    Returns:
        A row a candidate: ``texts_positive`` and ``texts_negative``, the share of texts at one of
        whose tokens it is among the strongest; ``alignment``, their difference, by which they are
        sorted; ``mean_positive`` and ``mean_negative``, the average activation over tokens. Only
        those with a positive alignment whose averages agree.
    """
    from fpo_core.models.load import inference_device, load_model, load_tokenizer, prepare_cpu
    from fpo_core.sae.coder import check_fits, load_coder

    recipe = run.recipe
    prepare_cpu(recipe.resources.threads)
    folder = run.reference_folder()
    model = load_model(
        folder, dtype=recipe.model.dtype, attention=recipe.model.attention,
        device=inference_device(),
    )  # fmt: skip
    coder, hookpoint = load_coder(sae_path(run), decoder=False), recipe.hookpoints[0]
    check_fits(coder, model, hookpoint, recipe.sae.source or "that this recipe trains")
    coder, tokenizer = coder.to(str(model.device)), load_tokenizer(folder)
    sides = [_side(model, coder, hookpoint, tokenizer, texts) for texts in (positive, negative)]
    (strong, means), (strong_negative, means_negative) = sides
    frame = pl.DataFrame({
        "feature": np.arange(coder.d_sae, dtype=np.uint32),
        "texts_positive": strong, "texts_negative": strong_negative,
        "alignment": strong - strong_negative,
        "mean_positive": means, "mean_negative": means_negative,
    })  # fmt: skip
    aligned = (pl.col("alignment") > 0) & (pl.col("mean_positive") > pl.col("mean_negative"))
    return frame.filter(aligned).sort(
        ["alignment", "mean_positive", "feature"], descending=[True, True, False]
    )


def _side(
    model: Any, coder: Any, hookpoint: Any, tokenizer: Any, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Of each feature [F]: the share of texts where it is strong, and its mean over tokens."""
    import torch

    from fpo_core.data.batches import PairIds, batches_by_length, collate
    from fpo_core.models.forward import scored_activations
    from fpo_core.progress import Progress

    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = []
    for number, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST]
        if ids:
            # A response is read where its tokens are predicted, one earlier: from the text's first
            # token, not from BOS, to its last, behind which any token serves.
            start = len(bos) + 1
            whole = [*bos, *ids, ids[-1]]
            rows.append(PairIds(str(number), whole[:start], whole[start:], ()))
    strong, total, tokens = np.zeros(coder.d_sae), np.zeros(coder.d_sae), 0
    with Progress("texts", total=len(rows), unit="text") as progress, torch.no_grad():
        for numbers in batches_by_length([row.length for row in rows], BATCH_TOKENS):
            batch = collate([rows[n] for n in numbers], device=str(model.device))
            (x,) = scored_activations(model, batch, [hookpoint])
            active = coder.active(x)
            lengths = batch.lengths.cpu().numpy()
            lengths = lengths[lengths > 0]
            total += np.bincount(active.feature, weights=active.value, minlength=coder.d_sae)
            tokens += int(lengths.sum())
            strong += _texts_where_strong(active, lengths, coder.d_sae)
            progress.advance(len(numbers))
    return strong / max(1, len(rows)), total / max(1, tokens)


def _texts_where_strong(active: Any, lengths: np.ndarray, d_sae: int) -> np.ndarray:
    """In how many texts each feature is among the strongest of some token."""
    order = np.lexsort((-active.value, active.token))
    first = np.searchsorted(active.token, active.token)  # tokens ascend
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order)) - first[order]
    strongest = rank < STRONGEST
    text = np.repeat(np.arange(len(lengths)), lengths)[active.token[strongest]]
    pairs = np.unique(text * d_sae + active.feature[strongest])
    return np.bincount(pairs % d_sae, minlength=d_sae)
