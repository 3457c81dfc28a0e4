"""The invariant at step 0: the policy *is* the reference, so u = 0, D = 0, loss = log 2.

Measured on the first batch from the real caches. A cache that was made with another model,
tokenizer, SAE, dtype or scoring rule shows here, before an hour of GPU time is spent.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpo_core.errors import FPOError
from fpo_core.training.cached import CachedBatch

# Largest drift of an average log-prob (nats a token) and of D relative to the features' own
# square that rounding explains, by the dtype of the reference pass.
LOGP_TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2}
DISCREPANCY_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


class StartReport(NamedTuple):
    """What was measured on the first batch."""

    logp_drift: float  # largest |A_policy - A_reference|, nats a token
    discrepancy: float  # largest D / mean square of the reference's top features


def check_start(
    logps: Tensor,
    cached: CachedBatch,
    lengths: Tensor,
    discrepancies: Sequence[Tensor],
    labels: Sequence[str],
    k: int,
    dtype: str,
    pair_ids: tuple[str, ...],
) -> StartReport:
    """Compare the untrained policy with the caches.

    Args:
        logps: [R] the policy's summed log-probs.
        cached: the reference side.
        lengths: [R] scored tokens.
        discrepancies: [R] of each SAE.
        labels: of each SAE's cache, for messages.
        k: the discrepancies' top-k.
        dtype: of the reference pass.
        pair_ids: of the batch, for the message.

    Raises:
        FPOError: naming the cache that disagrees, by how much, and what to do.
    """
    drift = ((logps - cached.logps).abs() / lengths).double()
    faults, worst = [], 0.0
    if not float(drift.max()) <= LOGP_TOLERANCE[dtype]:
        faults.append(
            f"`reference`: the cached log-probs differ from the policy's by "
            f"{float(drift.max()):.3g} nats a token (pair {_worst(drift, pair_ids)}; {dtype} "
            f"explains {LOGP_TOLERANCE[dtype]:g})"
        )
    for pooled, discrepancy, label in zip(cached.pooled, discrepancies, labels, strict=True):
        values = pooled.top.values[:, :k]
        # Of tokens' features too: a mean of squares is at least the square of the mean.
        scale = values.square().sum(1).clamp_min(1e-12) / values.shape[1]
        relative = (discrepancy / scale).double()
        worst = max(worst, float(relative.max()))
        if not float(relative.max()) <= DISCREPANCY_TOLERANCE[dtype]:
            faults.append(
                f"`{label}`: the discrepancy is {float(relative.max()):.3g} of the features' own "
                f"size (pair {_worst(relative, pair_ids)}; {dtype} explains "
                f"{DISCREPANCY_TOLERANCE[dtype]:g})"
            )
    report = StartReport(float(drift.max()), worst)
    if faults:
        raise FPOError(
            "before the first step the policy is the reference, but the caches disagree with it: "
            + "; ".join(faults)
            + ". They were made with another model, tokenizer, SAE or dtype; recompute them with "
            "`fpo run RECIPE --from reference --force`"
        )
    return report


def _worst(values: Tensor, pair_ids: tuple[str, ...]) -> str:
    return pair_ids[int(torch.argmax(values.nan_to_num(nan=torch.inf))) // 2]
