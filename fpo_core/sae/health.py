"""Does an SAE still read the activations of a policy that moves? FVU and L0 of scored tokens.

- FVU, the fraction of variance unexplained: sum |x - x_hat|^2 / sum |x - m|^2, with m the mean of
  all tokens that are measured together, also where it is taken of a single pair's tokens;
- L0: mean number of active features a token.

Sums add up over batches and ranks: ``health_sums`` makes them, ``sae_health`` reads them.

Shapes: N scored tokens, P pairs, d = d_in.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fpo_core.sae.coder import SparseCoder

_COUNTS = 4  # columns of the sums before those of the tokens' own sum
LOW, HIGH = 0.05, 0.95  # percentiles of the pairs that bound what is usual
LEAST_ROOM = 0.1  # of the figure itself, on either side


class Health(NamedTuple):
    """A quantity over all tokens, and pair by pair."""

    value: float
    by_pair: Tensor  # [P] float64


@torch.no_grad()
def health_sums(coder: SparseCoder, x: Tensor, pair: Tensor, pairs: int) -> Tensor:
    """Sums over each pair's tokens: count, active features, squared error, squares, activations.

    Args:
        coder: the SAE, with its decoder.
        x: activations [N, d].
        pair: [N] which pair each token belongs to.
        pairs: P.

    Returns:
        [P, 4 + d] float64.
    """
    sums = torch.zeros(pairs, _COUNTS + coder.d_in, dtype=torch.float64, device=x.device)
    for part in coder.chunks(len(x)):
        acts, exact = coder.encode(x[part]), x[part].double()
        error = exact - coder.decode(acts, x[part]).double()
        counts = (
            torch.ones_like(exact[:, 0]), (acts > 0).sum(1).double(), error.square().sum(1),
            exact.square().sum(1),
        )  # fmt: skip
        sums.index_add_(0, pair[part], torch.cat([torch.stack(counts, 1), exact], 1))
    return sums


def sae_health(sums: Tensor) -> dict[str, Health]:
    """FVU and L0 of the sums [P, 4 + d] of ``health_sums``; every pair has a token."""
    tokens, active, error, squares = sums[:, :_COUNTS].unbind(1)
    own = sums[:, _COUNTS:]
    mean = own.sum(0) / tokens.sum()
    # sum |x - m|^2, opened up; float64 leaves enough of the difference.
    variance = squares - 2 * own @ mean + tokens * mean.square().sum()
    least = torch.finfo(torch.float64).tiny
    return {
        "fvu": Health(
            float(error.sum() / variance.sum().clamp_min(least)), error / variance.clamp_min(least)
        ),
        "l0": Health(float(active.sum() / tokens.sum()), active / tokens),
    }


def usual_range(health: Health) -> tuple[float, float]:
    """Where a quantity may be: the 5th to the 95th percentile of the pairs' own values.

    It reaches a tenth of the quantity to either side at least: a few pairs have percentiles close
    together, and a TopK SAE's L0 is the same on all of them.
    """
    ends = torch.tensor([LOW, HIGH], dtype=torch.float64, device=health.by_pair.device)
    low, high = torch.quantile(health.by_pair, ends).tolist()
    room = LEAST_ROOM * health.value
    return min(low, health.value - room), max(high, health.value + room)
