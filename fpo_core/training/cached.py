"""The reference side of a batch as tensors, from the examples' caches."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.features.discrepancy import CachedFeatures
from fpo_core.features.pool import TopFeatures
from fpo_core.training.examples import Example
from fpo_core.training.feature_shards import CachedSide, TokenFeatures


class CachedBatch(NamedTuple):
    """What the caches hold of a batch of R responses with N scored tokens."""

    logps: Tensor  # [R] float64, summed
    pooled: tuple[CachedFeatures, ...]  # of each SAE, a row a response
    tokens: tuple[CachedFeatures, ...]  # of each SAE, a row a scored token; empty unless they count
    pinned: Tensor  # [R, P] the first SAE's pinned features


def cached_batch(
    examples: Sequence[Example], device: str, pinned: Sequence[int] = ()
) -> CachedBatch:
    """Gather the reference side of examples.

    Args:
        examples: a batch's.
        device: torch device of the tensors.
        pinned: the first SAE's pinned features, whose values the examples hold.
    """
    logps = [logp for example in examples for logp in example.logps]
    saes = range(len(examples[0].features))
    sides = [[side for example in examples for side in example.features[sae]] for sae in saes]
    unpooled = [[side.tokens for side in every if side.tokens is not None] for every in sides]
    pooled = [_pooled(every, device) for every in sides]
    values = torch.zeros(len(logps), len(pinned), device=device)
    if pinned:
        held = np.stack([side.pooled.pinned for side in sides[0]])
        values = torch.tensor(held, dtype=torch.float32, device=device)
        indices = torch.tensor(pinned, device=device).expand(len(values), -1)
        pooled[0] = pooled[0]._replace(pinned=TopFeatures(indices, values))
    return CachedBatch(
        torch.tensor(logps, dtype=torch.float64, device=device),
        tuple(pooled),
        tuple(_tokens(every, device) for every in unpooled if every),
        values,
    )


def _pooled(sides: Sequence[CachedSide], device: str) -> CachedFeatures:
    rows = [side.pooled for side in sides]
    width = max(1, *(len(row.indices) for row in rows))
    indices = np.full((len(rows), width), -1, dtype=np.int64)
    values = np.zeros((len(rows), width), dtype=np.float32)
    for number, row in enumerate(rows):
        indices[number, : len(row.indices)] = row.indices
        values[number, : len(row.values)] = row.values
    cutoff = np.array([row.cutoff for row in rows], dtype=np.float32)
    return _features(indices, values, cutoff, device)


def _tokens(rows: Sequence[TokenFeatures], device: str) -> CachedFeatures:
    width = max(row.indices.shape[1] for row in rows)
    padding = [((0, 0), (0, width - row.indices.shape[1])) for row in rows]
    indices = [np.pad(r.indices, p, constant_values=-1) for r, p in zip(rows, padding, strict=True)]
    values = [np.pad(row.values, p) for row, p in zip(rows, padding, strict=True)]
    cutoff = np.concatenate([row.cutoff for row in rows])
    return _features(
        np.concatenate(indices).astype(np.int64), np.concatenate(values), cutoff, device
    )


def _features(
    indices: np.ndarray, values: np.ndarray, cutoff: np.ndarray, device: str
) -> CachedFeatures:  # fmt: skip
    top = TopFeatures(torch.tensor(indices, device=device), torch.tensor(values, device=device))
    return CachedFeatures(top, torch.tensor(cutoff, device=device))
