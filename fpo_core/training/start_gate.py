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
from fpo_core.features.discrepancy import CachedFeatures
from fpo_core.hookpoint import Site
from fpo_core.recipe.training import TrainSettings
from fpo_core.training.cached import CachedBatch
from fpo_core.training.job import JobSae
from fpo_core.training.loss import BatchLoss

# Largest drift of an average log-prob (nats a token) that rounding explains, as (floor, share that
# shrinks with the root of the scored tokens), by the dtype of the reference pass.
LOGP_TOLERANCE = {"float32": (2e-4, 0.0), "bfloat16": (0.02, 0.4)}
# Largest D, relative to the mean square of the reference's own top features, as (floor, share that
# shrinks with the tokens): in a short response one feature that rounding switches on is much.
DISCREPANCY_TOLERANCE = {"float32": (1e-5, 5e-3), "bfloat16": (1e-2, 0.1)}
# The same of an SAE that reads what an MLP adds, which rounding moves more: gemma2-tiny's pairs in
# bfloat16 come to 0.017 and 0.026 at most there, on CPUs that round differently, and to 0.011 in
# the stream. The same model before its warm start comes to 0.12 in the median, at either.
MLP_OUT_TOLERANCE = {"float32": (1e-5, 5e-3), "bfloat16": (3e-2, 0.3)}


def logp_tolerance(dtype: str, lengths: Tensor) -> Tensor:
    """Largest explained drift [R] of average log-probs over [R] scored tokens, nats a token."""
    floor, share = LOGP_TOLERANCE[dtype]
    return floor + share / lengths.double().sqrt()


def discrepancy_tolerance(dtype: str, site: Site, lengths: Tensor) -> Tensor:
    """Largest explained D [R] of an SAE at a site, relative to the reference's own features."""
    floor, share = (MLP_OUT_TOLERANCE if site == "mlp_out" else DISCREPANCY_TOLERANCE)[dtype]
    return floor + share / lengths.double()


class _Measured(NamedTuple):
    """One cache's disagreement with the policy, response by response."""

    label: str
    said: str  # with a place for the number
    values: Tensor  # [R]
    explained: Tensor  # [R]


def check_start(
    loss: BatchLoss,
    cached: CachedBatch,
    batch: PairBatch,
    saes: Sequence[JobSae],
    settings: TrainSettings,
    dtype: str,
) -> None:
    """Compare the untrained policy with the caches.

    Args:
        loss: of the first batch.
        cached: its reference side.
        batch: the pairs.
        saes: the SAEs, whose caches they are.
        settings: the recipe's ``train`` section.
        dtype: of the reference pass.

    Raises:
        FPOError: naming the cache that disagrees, by how much, and what to do.
    """
    faults = []
    for label, said, values, explained in _measured(loss, cached, batch, saes, settings, dtype):
        beyond = (values / explained).nan_to_num(nan=torch.inf)
        worst = int(torch.argmax(beyond))
        if not float(beyond[worst]) <= 1:
            faults.append(
                f"`{label}`: {said.format(float(values[worst]))} (pair "
                f"{batch.pair_ids[worst // 2]}; {dtype} explains {float(explained[worst]):.2g})"
            )
    if faults:
        raise FPOError(
            "before the first step the policy is the reference, but the caches disagree with it: "
            + "; ".join(faults)
            + ". They were made with another model, tokenizer, SAE or dtype; recompute them with "
            "`fpo run RECIPE --from reference --force`"
        )


def _measured(
    loss: BatchLoss,
    cached: CachedBatch,
    batch: PairBatch,
    saes: Sequence[JobSae],
    settings: TrainSettings,
    dtype: str,
) -> Iterator[_Measured]:
    drift = ((loss.policy_logps - cached.logps).abs() / batch.lengths).double()
    said = "the cached log-probs differ from the policy's by {:.3g} nats a token"
    yield _Measured("reference", said, drift, logp_tolerance(dtype, batch.lengths))
    said = "the discrepancy is {:.3g} of the features' own size"
    for label, site, discrepancy, scale in _discrepancies(loss, cached, batch, saes, settings):
        explained = discrepancy_tolerance(dtype, site, batch.lengths)
        relative = (discrepancy / scale.clamp_min(1e-12)).double()
        yield _Measured(label, said, relative, explained)


def _discrepancies(
    loss: BatchLoss,
    cached: CachedBatch,
    batch: PairBatch,
    saes: Sequence[JobSae],
    settings: TrainSettings,
) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """Label, site, D [R] and the mean square [R] of the reference's top features, a cache each."""

    def mean_square(features: CachedFeatures) -> Tensor:
        return features.top.values[:, : settings.k].square().sum(1) / settings.k

    if settings.pooled:
        scales = [mean_square(features) for features in cached.pooled]
    else:
        lengths = batch.lengths.tolist()
        tokens = [mean_square(features).split(lengths) for features in cached.tokens]
        scales = [torch.stack([part.mean() for part in parts]) for parts in tokens]
    for sae, discrepancy, scale in zip(saes, loss.sae_discrepancies, scales, strict=True):
        yield sae.label, sae.hookpoint.site, discrepancy, scale
    if settings.groups:
        first, changed = saes[0], loss.groups.max(1).values
        label = f"{first.label}, train.groups"
        yield label, first.hookpoint.site, changed, mean_square(cached.pooled[0])
