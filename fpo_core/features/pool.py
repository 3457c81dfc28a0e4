"""Mean-pooled SAE features of responses, and their top-k.

Shapes: N scored tokens, R responses, F = d_sae.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fpo_core.sae.coder import SparseCoder

CHUNK_TOKENS = 512


class TopFeatures(NamedTuple):
    """The largest features of each response, padded to one width."""

    indices: Tensor  # [R, k] int64, -1 where a response has fewer
    values: Tensor  # [R, k] float32, descending, 0 in padding


@torch.no_grad()
def pool_features(coder: SparseCoder, x: Tensor, response: Tensor, lengths: Tensor) -> Tensor:
    """Mean over scored positions of the SAE's activations (c-bar of the paper's Eq. 10).

    Args:
        coder: the SAE.
        x: [N, d_in] activations at the scored positions.
        response: [N] response of each position.
        lengths: [R] scored positions of each response.

    Returns:
        [R, F] float32. Encoding is chunked: N x F is never held.
    """
    pooled = torch.zeros(len(lengths), coder.d_sae, device=x.device)
    for start in range(0, len(x), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        pooled += _membership(response[part], len(lengths)) @ coder.encode(x[part])
    return pooled / lengths[:, None]


def _membership(response: Tensor, responses: int) -> Tensor:
    """[R, n] matrix with a 1 where a token belongs to a response."""
    return (torch.arange(responses, device=response.device)[:, None] == response).float()


def top_features(pooled: Tensor, k: int) -> TopFeatures:
    """The k largest positive features of each row; ties go to the lower index.

    ``torch.topk`` leaves the order of ties open, so this sorts, stably.
    """
    k = min(k, pooled.shape[1])
    values, indices = torch.sort(pooled, dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    positive = values > 0
    return TopFeatures(torch.where(positive, indices, -1), torch.where(positive, values, 0.0))
