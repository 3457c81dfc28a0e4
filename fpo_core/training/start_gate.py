"""The invariant at step 0: the policy *is* the reference, so u = 0, D = 0, loss = log 2.

Measured on the first batch from the real caches. A cache that was made with another model,
tokenizer, SAE, dtype or scoring rule shows here, before an hour of GPU time is spent.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpo_core.data.batches import PairBatch
from fpo_core.errors import FPOError
from fpo_core.recipe.schema import TrainSettings
from fpo_core.training.cached import CachedBatch
from fpo_core.training.loss import BatchLoss

# Largest drift of an average log-prob (nats a token) that rounding explains, as (floor, share that
# shrinks with the root of the scored tokens), by the dtype of the reference pass.
LOGP_TOLERANCE = {"float32": (2e-4, 0.0), "bfloat16": (0.02, 0.4)}
# Largest D, relative to the mean square of the reference's own top features, as (floor, share that
# shrinks with the tokens): in a short response one feature that rounding switches on is much.
DISCREPANCY_TOLERANCE = {"float32": (1e-5, 5e-3), "bfloat16": (1e-2, 0.1)}


def logp_tolerance(dtype: str, lengths: Tensor) -> Tensor:
    """Largest explained drift [R] of average log-probs over [R] scored tokens, nats a token."""
    floor, share = LOGP_TOLERANCE[dtype]
    return floor + share / lengths.double().sqrt()


def discrepancy_tolerance(dtype: str, lengths: Tensor) -> Tensor:
    """Largest explained D [R], relative to the reference's own features."""
    floor, share = DISCREPANCY_TOLERANCE[dtype]
    return floor + share / lengths.double()


class StartReport(NamedTuple):
    """What was measured on the first batch."""

    logp_drift: float  # largest |A_policy - A_reference|, nats a token
    discrepancy: float  # largest D / mean square of the reference's top features


def check_start(
    loss: BatchLoss,
    cached: CachedBatch,
    batch: PairBatch,
    labels: Sequence[str],
    settings: TrainSettings,
    dtype: str,
) -> StartReport:
    """Compare the untrained policy with the caches.

    Args:
        loss: of the first batch.
        cached: its reference side.
        batch: the pairs.
        labels: of each SAE's cache, for messages.
        settings: the recipe's ``train`` section.
        dtype: of the reference pass.

    Raises:
        FPOError: naming the cache that disagrees, by how much, and what to do.
    """
    lengths, faults = batch.lengths, []
    drift = ((loss.policy_logps - cached.logps).abs() / lengths).double()
    explained = logp_tolerance(dtype, lengths)
    worst = _worst(drift, explained)
    if worst is not None:
        faults.append(
            f"`reference`: the cached log-probs differ from the policy's by "
            f"{float(drift[worst]):.3g} nats a token (pair {batch.pair_ids[worst // 2]}; {dtype} "
            f"explains {float(explained[worst]):.2g})"
        )
    explained = discrepancy_tolerance(dtype, lengths)
    largest = 0.0
    for label, discrepancy, scale in _discrepancies(loss, cached, batch, labels, settings):
        relative = (discrepancy / scale.clamp_min(1e-12)).double()
        largest = max(largest, float(relative.max()))
        worst = _worst(relative, explained)
        if worst is not None:
            faults.append(
                f"`{label}`: the discrepancy is {float(relative[worst]):.3g} of the features' own "
                f"size (pair {batch.pair_ids[worst // 2]}; {dtype} explains "
                f"{float(explained[worst]):.2g})"
            )
    report = StartReport(float(drift.max()), largest)
    if faults:
        raise FPOError(
            "before the first step the policy is the reference, but the caches disagree with it: "
            + "; ".join(faults)
            + ". They were made with another model, tokenizer, SAE or dtype; recompute them with "
            "`fpo run RECIPE --from reference --force`"
        )
    return report


def _discrepancies(
    loss: BatchLoss,
    cached: CachedBatch,
    batch: PairBatch,
    labels: Sequence[str],
    settings: TrainSettings,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Label, D [R] and the mean square [R] of the reference's top features, a cache each."""
    if not labels:
        return
    k = settings.k
    pooled = [features.top.values[:, :k].square().sum(1) / k for features in cached.pooled]
    if settings.pooled:
        yield from zip(labels, loss.sae_discrepancies, pooled, strict=True)
    else:
        for label, found, features in zip(
            labels, loss.sae_discrepancies, cached.tokens, strict=True
        ):
            squares = features.top.values[:, :k].square().sum(1) / k
            means = [tokens.mean() for tokens in squares.split(batch.lengths.tolist())]
            yield label, found, torch.stack(means)
    if settings.groups:
        yield f"{labels[0]}, train.groups", loss.groups.max(1).values, pooled[0]


def _worst(values: Tensor, allowed: Tensor) -> int | None:
    """The response that goes furthest beyond what is allowed; None where none does."""
    beyond = (values / allowed).nan_to_num(nan=torch.inf)
    worst = int(torch.argmax(beyond))
    return worst if not float(beyond[worst]) <= 1 else None
