"""The feature discrepancy of the paper's Eq. 10, with its cheap exact gradient.

For each response, I = top-k of the policy's pooled features united with the top-k of the
reference's, and D = (1/k) * sum over I of (c_policy - c_reference)^2. The authors' code takes the
policy's top-k alone; that, and the reference's alone, are options.

I is chosen without gradient from the full encode; then only the columns in I are encoded again
with gradient. The result equals differentiating the full encode, because D depends on no other
column, and the memory of the backward pass does not grow with the SAE's width.

Shapes: N scored tokens, R responses, F = d_sae.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fpo_core.features.pool import TopFeatures, pool_features, top_features
from fpo_core.sae.coder import SparseCoder

IndexSet = Literal["union", "policy", "reference"]


class Discrepancy(NamedTuple):
    """D of each response, and what the cache could not answer."""

    values: Tensor  # [R] float32, differentiable in the activations
    missing: Tensor  # [R] int64: indices of I that the cache does not store (read as 0)


def feature_discrepancy(
    coder: SparseCoder,
    x: Tensor,
    response: Tensor,
    lengths: Tensor,
    reference: TopFeatures,
    cutoff: Tensor,
    k: int,
    index_set: IndexSet = "union",
) -> Discrepancy:
    """The discrepancy between the policy's features and the cached reference's.

    Args:
        coder: the SAE, frozen.
        x: [N, d_in] the policy's activations at the scored positions, with gradient.
        response: [N] response of each position, ascending.
        lengths: [R] scored positions of each response.
        reference: the cached pooled features, at least the top k of each response.
        cutoff: [R] largest pooled value that the cache does not store; 0 when it stores all.
        k: size of each side's top-k.
        index_set: which of the two top-k make up I.
    """
    policy = top_features(pool_features(coder, x.detach(), response, lengths), k)
    stored = torch.zeros(len(lengths), coder.d_sae, dtype=torch.bool, device=x.device)
    target = torch.zeros(len(lengths), coder.d_sae, device=x.device)
    _scatter(stored, reference.indices, torch.ones_like(reference.values, dtype=torch.bool))
    _scatter(target, reference.indices, reference.values)
    union = torch.zeros_like(stored)
    if index_set != "reference":
        _scatter(union, policy.indices, torch.ones_like(policy.indices, dtype=torch.bool))
    if index_set != "policy":
        known = reference.indices[:, :k]
        _scatter(union, known, torch.ones_like(known, dtype=torch.bool))
    values = []
    for row, tokens in enumerate(torch.split(x, lengths.tolist())):
        columns = union[row].nonzero().squeeze(1)
        pooled = coder.encode_columns(tokens, columns).sum(0) / lengths[row]
        values.append((pooled - target[row, columns]).square().sum() / k)
    missing = (union & ~stored).sum(1) * (cutoff > 0)
    return Discrepancy(torch.stack(values), missing)


def _scatter(table: Tensor, indices: Tensor, values: Tensor) -> None:
    """Write values at indices [R, m] of a table [R, F], leaving out padding (-1)."""
    rows, places = (indices >= 0).nonzero(as_tuple=True)
    table[rows, indices[rows, places]] = values[rows, places]
