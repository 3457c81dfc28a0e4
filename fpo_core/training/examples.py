"""Training examples from aligned shards, and the order they are trained in."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fpo_core.data.batches import PairIds
from fpo_core.errors import FPOError
from fpo_core.features.pool import TopFeatures


class PooledFeatures(NamedTuple):
    """The cached pooled features of one response."""

    indices: np.ndarray  # [cache_k] or fewer
    values: np.ndarray
    cutoff: float


class Example(NamedTuple):
    """A pair with everything the reference side contributes."""

    ids: PairIds
    logps: tuple[float, float]  # reference, summed: chosen, rejected
    features: tuple[PooledFeatures, PooledFeatures]  # reference: chosen, rejected


def read_examples(
    pairs: tuple[Path, ...], reference: tuple[Path, ...], pooled: tuple[Path, ...], split: str
) -> list[Example]:
    """Join the aligned shards of a split, row by row.

    Raises:
        FPOError: shards that do not hold the same pairs or the same scored tokens.
    """
    examples: list[Example] = []
    for shard, files in enumerate(zip(pairs, reference, pooled, strict=True)):
        ids, refs, feats = (pq.read_table(path).to_pylist() for path in files)
        if not len(ids) == len(refs) == len(feats) // 2:
            raise FPOError(
                f"shard {shard}: {len(ids)} pairs, {len(refs)} reference rows and "
                f"{len(feats)} feature rows; rerun reference and features with --force"
            )
        for row, (pair, ref) in enumerate(zip(ids, refs, strict=True)):
            if pair["split"] == split:
                examples.append(_join(pair, ref, feats[2 * row : 2 * row + 2], shard, row))
    return examples


def _join(pair: dict, ref: dict, feats: list[dict], shard: int, row: int) -> Example:
    where = f"shard {shard}, row {row}"
    names = {pair["pair_id"], ref["pair_id"], *(feature["pair_id"] for feature in feats)}
    if len(names) != 1:
        raise FPOError(
            f"{where}: pairs, reference and features disagree on the pair: {sorted(names)}"
        )
    for side, feature in zip(("chosen", "rejected"), feats, strict=True):
        counts = {len(pair[f"{side}_ids"]), ref[f"{side}_tokens"], feature["n_tokens"]}
        if len(counts) != 1 or feature["side"] != side:
            raise FPOError(f"{where}: the caches disagree on the {side} response: {counts} tokens")
    ids = PairIds(pair["pair_id"], pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
    stored = [
        PooledFeatures(np.array(f["indices"]), np.array(f["values"], dtype=np.float32), f["cutoff"])
        for f in feats
    ]
    return Example(ids, (ref["chosen_logp"], ref["rejected_logp"]), (stored[0], stored[1]))


def epoch_batches(
    num_examples: int, batch_size: int, epochs: int, seed: int
) -> Iterator[list[int]]:
    """Row numbers of every optimizer step's global batch; a pure function of its arguments.

    An epoch's last batch may be smaller; it is trained on all the same.
    """
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(num_examples).tolist()
        for start in range(0, num_examples, batch_size):
            yield order[start : start + batch_size]


def num_steps(num_examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run."""
    return epochs * -(-num_examples // batch_size)


def reference_features(examples: list[Example], device: str) -> tuple[TopFeatures, Tensor]:
    """The cached features of a batch as padded tensors [R, cache_k] and the cutoffs [R]."""
    rows = [feature for example in examples for feature in example.features]
    width = max(1, *(len(row.indices) for row in rows))
    indices = torch.full((len(rows), width), -1, dtype=torch.int64)
    values = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        indices[number, : len(row.indices)] = torch.as_tensor(row.indices.astype(np.int64))
        values[number, : len(row.values)] = torch.as_tensor(row.values)
    cutoff = torch.tensor([row.cutoff for row in rows])
    return TopFeatures(indices.to(device), values.to(device)), cutoff.to(device)
