"""The feature discrepancy of the paper's Eq. 10, with its cheap exact gradient.

For each response, I = top-k of the policy's pooled features united with the top-k of the
reference's, and D = (1/k) * sum over I of (c_policy - c_reference)^2. The authors' code takes the
policy's top-k alone; that, and the reference's alone, are options.

I is chosen without gradient from the full encode; then only the columns in I are encoded again
with gradient. The result equals differentiating the full encode, because D depends on no other
column, and the memory of the backward pass does not grow with the SAE's width.

Shapes: N scored tokens, R responses, F = d_sae.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fpo_core.features.pool import TopFeatures, pool_features, top_features
from fpo_core.sae.coder import SparseCoder

IndexSet = Literal["union", "policy", "reference"]


class Responses(NamedTuple):
    """A batch's scored tokens at one hookpoint, and which response each belongs to."""

    x: Tensor  # [N, d_in] the policy's activations, with gradient
    response: Tensor  # [N] ascending
    lengths: Tensor  # [R] scored tokens of each


class CachedFeatures(NamedTuple):
    """What a cache holds of the reference's features, one row a response or a token."""

    top: TopFeatures  # [rows, m]
    cutoff: Tensor  # [rows] largest value that is not stored, or any bound on it; 0: all are stored
    pinned: TopFeatures | None = None  # [rows, P] values that are known beside the top ones


class Discrepancy(NamedTuple):
    """D of each response, and what the cache could not answer."""

    values: Tensor  # [R] float32, differentiable in the activations
    missing: Tensor  # [R] int64: indices of I that the cache does not store (read as 0)


def feature_discrepancy(
    coder: SparseCoder,
    policy: Responses,
    reference: CachedFeatures,
    k: int,
    index_set: IndexSet = "union",
) -> Discrepancy:
    """D between the policy's pooled features and the cached reference's (Eq. 10).

    Args:
        coder: the SAE, frozen.
        policy: the policy's activations at the scored positions.
        reference: the cached pooled features [R, m], the top k first.
        k: size of each side's top-k.
        index_set: which of the two top-k make up I.
    """
    x, response, lengths = policy
    pooled = pool_features(coder, x.detach(), response, lengths)
    chosen, target, missing = _compared(pooled, reference, k, index_set)
    values = []
    for row, tokens in enumerate(torch.split(x, lengths.tolist())):
        columns = chosen[row].nonzero().squeeze(1)
        mean = coder.encode_columns(tokens, columns).sum(0) / lengths[row]
        values.append((mean - target[row, columns]).square().sum() / k)
    return Discrepancy(torch.stack(values), missing)


def token_discrepancy(
    coder: SparseCoder,
    policy: Responses,
    reference: CachedFeatures,
    k: int,
    index_set: IndexSet = "union",
) -> Discrepancy:
    """The unpooled variant ("no compression"): D of each token, averaged over the response.

    Every token has an I of its own, so the whole encode is differentiated, chunk by chunk and
    encoded again in backward: twice the encoding, and a chunk's activations in memory.

    Args:
        coder: the SAE, frozen.
        policy: the policy's activations at the scored positions.
        reference: the cached features of every token [N, m], the top k first.
        k: size of each side's top-k.
        index_set: which of the two top-k make up I.
    """
    x, _, lengths = policy

    def of_chunk(tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        stored = CachedFeatures(
            TopFeatures(*(table[part] for table in reference.top)), reference.cutoff[part]
        )
        acts = coder.encode(tokens)
        chosen, target, absent = _compared(acts.detach(), stored, k, index_set)
        return ((acts - target).square() * chosen).sum(1) / k, absent

    found = [
        checkpoint(of_chunk, x[part], part, use_reentrant=False) for part in coder.chunks(len(x))
    ]
    values, missing = (
        torch.cat(parts).split(lengths.tolist()) for parts in zip(*found, strict=True)
    )
    return Discrepancy(
        torch.stack([tokens.mean() for tokens in values]),
        torch.stack([tokens.sum() for tokens in missing]),
    )


def group_discrepancies(
    coder: SparseCoder, policy: Responses, groups: Sequence[Tensor], reference: Tensor
) -> Tensor:
    """Mean over each feature group of (c_policy - c_reference)^2, the paper's Section 5.3.

    Args:
        coder: the SAE, frozen.
        policy: the policy's activations at the scored positions.
        groups: each group's features [g], in one order with ``reference``.
        reference: [R, sum of g] the cached pooled values of the groups' features, group by group.

    Returns:
        [R, G] float32, differentiable in the activations.
    """
    acts = coder.encode_columns(policy.x, torch.cat(list(groups)))
    means = torch.stack([tokens.mean(0) for tokens in acts.split(policy.lengths.tolist())])
    squares = (means - reference).square()
    return torch.stack(
        [part.mean(1) for part in squares.split([len(group) for group in groups], dim=1)], dim=1
    )


def _compared(
    values: Tensor, reference: CachedFeatures, k: int, index_set: IndexSet
) -> tuple[Tensor, Tensor, Tensor]:
    """I as a mask [rows, F], the reference's values [rows, F], and how many of I are not stored."""
    top, cutoff, pinned = reference
    stored = torch.zeros_like(values, dtype=torch.bool)
    target = torch.zeros_like(values)
    chosen = torch.zeros_like(stored)
    for known in (top, pinned):
        if known is not None:
            _scatter(stored, known.indices, torch.ones_like(known.indices, dtype=torch.bool))
            _scatter(target, known.indices, known.values)
    if index_set != "reference":
        mine = top_features(values, k).indices
        _scatter(chosen, mine, torch.ones_like(mine, dtype=torch.bool))
    if index_set != "policy":
        theirs = top.indices[:, :k]
        _scatter(chosen, theirs, torch.ones_like(theirs, dtype=torch.bool))
    missing = (chosen & ~stored).sum(1) * (cutoff > 0)
    return chosen, target, missing


def _scatter(table: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values at indices [R, m] of a table [R, F], leaving out padding (-1)."""
    rows, places = (indices >= 0).nonzero(as_tuple=True)
    table[rows, indices[rows, places]] = values[rows, places]
