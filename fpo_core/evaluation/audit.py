"""What preference training moved, feature by feature: effect sizes on held-out responses.

A response's change of a feature is the policy's mean activation over its scored tokens less the
reference's. Over P responses of one side: the mean change with its 95 % t-interval, the effect size
d = mean / standard deviation (Cohen's d of paired differences), a two-sided t-test, and q, the
false discovery rate at which it counts as moved (Benjamini and Hochberg, over all features and
sides). Two numbers a feature are added up, so memory follows the SAE's width, not the pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from fpo_core.data.batches import PairIds, batches_by_length, collate
from fpo_core.features.pool import pool_features
from fpo_core.models.forward import scored_activations
from fpo_core.progress import not_shown
from fpo_core.sae.coder import AttachedSae

SIDES = ("chosen", "rejected")
CONFIDENCE = 0.95


class Moments(NamedTuple):
    """Sums over responses, by side, of quantities [2, F] (features, or groups of them)."""

    responses: int  # of each side
    reference: np.ndarray  # sum of means
    policy: np.ndarray
    change: np.ndarray  # sum of policy less reference
    squares: np.ndarray  # sum of its squares


class Changes(NamedTuple):
    """How features moved on one side; arrays [F]."""

    reference: np.ndarray  # mean over responses
    policy: np.ndarray
    change: np.ndarray
    low: np.ndarray  # of its 95 % interval
    high: np.ndarray
    effect: np.ndarray  # change over the standard deviation of changes; 0 where nothing changed
    p: np.ndarray


@torch.no_grad()
def audit_moments(
    policy: Any,
    reference: Any,
    pairs: Sequence[PairIds],
    sae: AttachedSae,
    groups: Mapping[str, Sequence[int]],
    *,
    tokens_per_batch: int,
    on_pairs: Callable[[int], None] = not_shown,
) -> tuple[Moments, Moments]:
    """Run policy and reference over held-out pairs, up to the SAE.

    Args:
        policy: the trained model.
        reference: the model it started from.
        pairs: held-out pairs.
        sae: the SAE.
        groups: features whose mean is followed too, by name.
        tokens_per_batch: most tokens a forward pass, padding included.
        on_pairs: told how many pairs were done after each batch.

    Returns:
        The moments of the features, and of the groups in their order.
    """
    width, members = sae.coder.d_sae, [np.asarray(found) for found in groups.values()]
    sums = [np.zeros((4, 2, size)) for size in (width, len(members))]
    for rows in batches_by_length([pair.length for pair in pairs], tokens_per_batch):
        batch = collate([pairs[row] for row in rows], device=str(policy.device))
        pooled = []
        for model in (reference, policy):
            (x,) = scored_activations(model, batch, [sae.hookpoint])
            found = pool_features(sae.coder, x, batch.response, batch.lengths)
            pooled.append(found.double().cpu().numpy())
        of_groups = [
            np.stack([one[:, group].mean(1) for group in members], 1)
            if members else np.zeros((len(one), 0))
            for one in pooled
        ]  # fmt: skip
        for added, (before, after) in zip(sums, (pooled, of_groups), strict=True):
            change = after - before
            for place, values in enumerate((before, after, change, change**2)):
                for side in (0, 1):
                    added[place, side] += values[side::2].sum(0)
        on_pairs(len(rows))
    features, grouped = (Moments(len(pairs), *added) for added in sums)
    return features, grouped


def changes(moments: Moments, side: int) -> Changes:
    """How features moved on one side.

    Args:
        moments: of at least two responses a side.
        side: 0 chosen, 1 rejected.
    """
    n = moments.responses
    mean = moments.change[side] / n
    # Rounding makes the variance of a constant change negative, by the size of its square.
    spread = moments.squares[side] / n - mean**2
    spread = np.where(spread > 1e-12 * np.maximum(mean**2, 1e-30), spread, 0.0)
    deviation = np.sqrt(spread * n / (n - 1))
    error = deviation / np.sqrt(n)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = np.where(mean == 0, 0.0, mean / deviation)
        p = np.where(mean == 0, 1.0, 2 * stats.t.sf(np.abs(mean / error), n - 1))
    return Changes(
        moments.reference[side] / n, moments.policy[side] / n, mean, mean - half, mean + half,
        effect, p,
    )  # fmt: skip


def discovery_rates(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """q of each test: the false discovery rate at which it counts; 1 where nothing was tested.

    Args:
        p: p-values.
        tested: which of them are of tests: a feature that never fires is none.
    """
    q = np.ones_like(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q
