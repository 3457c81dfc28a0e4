"""Mean-pooled SAE features of responses, and their top-k.

Shapes: N scored tokens, R responses, F = d_sae.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fpo_core.sae.coder import SparseCoder


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
    for part in coder.chunks(len(x)):
        add_by_response(pooled, coder.encode(x[part]), response[part])
    return pooled.div_(lengths[:, None])


def add_by_response(sums: Tensor, acts: Tensor, response: Tensor) -> None:
    """Add token activations [n, F] to their responses' rows of ``sums`` [R, F].

    A product with a 0/1 matrix of the few responses that a chunk reaches over: ``response`` [n] is
    ascending. Faster than an ``index_add``, and its order of summation is fixed.
    """
    first, last = int(response[0]), int(response[-1])
    member = torch.arange(first, last + 1, device=response.device)[:, None] == response
    sums[first : last + 1].addmm_(member.to(acts.dtype), acts)


def top_features(values: Tensor, k: int) -> TopFeatures:
    """The k largest positive features of each row [R, F]; ties go to the lower index.

    ``torch.topk`` leaves the order of ties open. Where there are any, the bits of a value with its
    index below them make a key that has none: a positive float32 sorts as its bits do.
    """
    k = min(k, values.shape[1])
    top, indices = torch.topk(values, min(k + 1, values.shape[1]), dim=1)
    if bool(((top[:, 1:] == top[:, :-1]) & (top[:, 1:] > 0)).any()):
        keys = values.clamp_min(0.0).view(torch.int32).to(torch.int64) << 32
        keys += torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
        indices = torch.topk(keys, k, dim=1).indices
        top = values.gather(1, indices)
    top, indices = top[:, :k], indices[:, :k]
    positive = top > 0
    return TopFeatures(torch.where(positive, indices, -1), torch.where(positive, top, 0.0))
