"""The loss of a batch: policy, caches, SAEs and a live reference brought to the objective.

What an engine does around it (ranks, micro-batches, optimizer) is not known here, so that training,
benchmarks and notebooks compute the same thing.

Shapes: B pairs, R = 2B responses (2i chosen, 2i + 1 rejected), G feature groups.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fpo_core.data.batches import PairBatch
from fpo_core.errors import FPOError
from fpo_core.features.discrepancy import (
    Discrepancy,
    Responses,
    feature_discrepancy,
    group_discrepancies,
    token_discrepancy,
)
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.forward import PairForward, ReferenceSide
from fpo_core.objectives import Objective, SideScores, objective
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.options import objective_options
from fpo_core.recipe.training import TrainSettings
from fpo_core.sae.coder import AttachedSae
from fpo_core.training.cached import CachedBatch


class BatchLoss(NamedTuple):
    """Losses with their gradient, and what explains them, detached."""

    losses: Tensor  # [B] with gradient
    objective: Objective
    policy_logps: Tensor  # [R]
    sae_discrepancies: tuple[Tensor, ...]  # [R] of each SAE, groups not included
    discrepancy: Tensor  # [R] D as constrained: all SAEs and weighted groups
    groups: Tensor  # [R, G] mean squared change of each feature group
    kl: Tensor  # [R] sequential KL(reference || policy); 0 without a live reference
    missing: Tensor  # [R] indices of I that the caches do not store


class PairLoss:
    """An objective with its options, SAEs and, where it has a KL, the live reference.

    Args:
        settings: the recipe's ``train`` section.
        saes: the SAEs; measured under every objective, held under those that constrain features.
        reference: the live reference, for objectives with a KL.

    Raises:
        FPOError: the objective constrains features and there is no SAE, or a KL and there is no
            reference.
    """

    def __init__(
        self,
        settings: TrainSettings,
        saes: Sequence[AttachedSae],
        reference: Callable[[PairBatch], ReferenceSide] | None = None,
    ) -> None:
        self.settings, self.saes, self.reference = settings, saes, reference
        self.method, self.options = METHODS[settings.method], objective_options(settings)
        if self.method.constraint == "features" and not saes:
            raise FPOError(f"{settings.method} constrains features: attach an SAE")
        if self.method.constraint == "kl" and reference is None:
            raise FPOError(f"{settings.method} constrains a KL: it needs the live reference model")
        places = {feature: place for place, feature in enumerate(settings.pinned)}
        self._pinned_places = [
            places[feature] for group in settings.groups for feature in group.features
        ]

    @property
    def hookpoints(self) -> tuple[Hookpoint, ...]:
        """Where the policy's activations are read."""
        return tuple(sae.hookpoint for sae in self.saes)

    def live(self, batch: PairBatch) -> ReferenceSide | None:
        """What the policy's forward pass needs of the live reference; None without one."""
        return None if self.reference is None else self.reference(batch)

    def __call__(self, batch: PairBatch, out: PairForward, cached: CachedBatch) -> BatchLoss:
        """The losses of a batch.

        Args:
            batch: the pairs.
            out: the policy's forward pass over them, with gradient, and with the KL to ``live``.
            cached: the reference side.
        """
        with torch.set_grad_enabled(
            torch.is_grad_enabled() and self.method.constraint == "features"
        ):
            found = [
                self._discrepancy(number, batch, out, cached) for number in range(len(self.saes))
            ]
            groups = self._groups(batch, out, cached)
            weights = [group.weight for group in self.settings.groups]
            held = groups @ torch.tensor(weights, device=groups.device)
            discrepancy = torch.stack([held, *(one.values for one in found)]).sum(0)
        kl = torch.zeros_like(out.logps) if out.kl is None else out.kl
        divergence = {"features": discrepancy, "kl": kl, None: None}[self.method.constraint]
        sides = [
            SideScores(
                out.logps[side::2], cached.logps[side::2], batch.lengths[side::2],
                None if divergence is None else divergence[side::2],
            )
            for side in (0, 1)
        ]  # fmt: skip
        result = objective(self.method, self.options, *sides)
        missing = [one.missing for one in found] or [torch.zeros_like(batch.lengths)]
        return BatchLoss(
            result.losses,
            result._replace(losses=result.losses.detach()),
            out.logps.detach(),
            tuple(one.values.detach() for one in found),
            discrepancy.detach(),
            groups.detach(),
            kl.detach(),
            torch.stack(missing).sum(0),
        )

    def _discrepancy(
        self, number: int, batch: PairBatch, out: PairForward, cached: CachedBatch
    ) -> Discrepancy:
        policy = Responses(out.activations[number], batch.response, batch.lengths)
        options = (self.settings.k, self.settings.index_set)
        coder = self.saes[number].coder
        if self.settings.pooled:
            return feature_discrepancy(coder, policy, cached.pooled[number], *options)
        return token_discrepancy(coder, policy, cached.tokens[number], *options)

    def _groups(self, batch: PairBatch, out: PairForward, cached: CachedBatch) -> Tensor:
        if not self.settings.groups:
            return torch.zeros(len(batch.lengths), 0, device=batch.lengths.device)
        device = batch.lengths.device
        groups = [torch.tensor(group.features, device=device) for group in self.settings.groups]
        policy = Responses(out.activations[0], batch.response, batch.lengths)
        reference = cached.pinned[:, self._pinned_places]
        return group_discrepancies(self.saes[0].coder, policy, groups, reference)


def metric_sums(
    loss: BatchLoss, settings: TrainSettings, *, compared: bool = True
) -> dict[str, float]:
    """What a step logs, summed over the pairs; margins of KL and D are rejected minus chosen.

    Args:
        loss: of a batch.
        settings: the recipe's ``train`` section.
        compared: whether the pairs have a rejected side and a cached reference; else only the loss.
    """
    result = loss.objective
    if not compared:
        return {"loss": float(result.losses.sum())}
    margins = result.chosen_rewards - result.rejected_rewards
    sums = {
        "loss": result.losses,
        "accuracy": margins > 0,
        "margin": margins,
        "chosen_reward": result.chosen_rewards,
        "rejected_reward": result.rejected_rewards,
        "difference": result.difference,
        "target_margin": result.margin,
        "constraint": result.constraint,
        **_by_side("discrepancy", loss.discrepancy),
        **_by_side("kl", loss.kl),
        "missing": loss.missing,
    }
    for number, group in enumerate(settings.groups):
        sums |= _by_side(f"group.{group.name}", loss.groups[:, number])
    return {name: float(values.sum()) for name, values in sums.items()}


def _by_side(name: str, values: Tensor) -> dict[str, Tensor]:
    chosen, rejected = values[0::2], values[1::2]
    return {
        f"{name}_chosen": chosen, f"{name}_rejected": rejected, f"{name}_margin": rejected - chosen,
    }  # fmt: skip
