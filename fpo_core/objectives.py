"""The objectives, composed as in the paper's Table 1.

Every method is u = log-prob difference - margin - constraint with loss = -log sigmoid(u); a
method is a choice of the three parts. S is a response's summed log-prob, n its tokens, A = S / n.

Shapes: B pairs.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SideScores(NamedTuple):
    """What one side (chosen or rejected) of a batch brings to the objective."""

    policy_logps: Tensor  # [B] summed, with gradient
    reference_logps: Tensor  # [B] summed
    num_tokens: Tensor  # [B]
    discrepancy: Tensor | None = None  # [B] feature discrepancy D, with gradient


class Objective(NamedTuple):
    """Unreduced losses and the quantities that explain them."""

    losses: Tensor  # [B]
    u: Tensor  # [B] detached
    chosen_rewards: Tensor  # [B] detached implicit rewards
    rejected_rewards: Tensor  # [B] detached


def log_prob_difference(
    chosen: SideScores, rejected: SideScores, beta: float, *, per_token: bool
) -> Tensor:
    """beta * (S_w - S_l), or with averages A where ``per_token``."""
    return beta * (_score(chosen, per_token) - _score(rejected, per_token))


def reference_margin(
    chosen: SideScores, rejected: SideScores, beta: float, *, per_token: bool
) -> Tensor:
    """The same difference under the reference: what the log-prob difference must exceed."""
    return beta * (_reference(chosen, per_token) - _reference(rejected, per_token))


def feature_constraint(
    chosen: Tensor, rejected: Tensor, alpha: float, beta: float, *, stop_gradient: bool
) -> Tensor:
    """alpha * (beta * D_l - sg(beta * D_w)), the paper's delta_FPO (sg as in TDPO-2)."""
    held = chosen.detach() if stop_gradient else chosen
    return alpha * beta * (rejected - held)


def fpo(
    chosen: SideScores, rejected: SideScores, *, beta: float, alpha: float, stop_gradient: bool
) -> Objective:
    """FPO: length-normalised difference and margin, and the feature constraint."""
    assert chosen.discrepancy is not None
    assert rejected.discrepancy is not None
    u = log_prob_difference(chosen, rejected, beta, per_token=True)
    u = u - reference_margin(chosen, rejected, beta, per_token=True)
    u = u - feature_constraint(
        chosen.discrepancy, rejected.discrepancy, alpha, beta, stop_gradient=stop_gradient
    )
    return _objective(u, chosen, rejected, beta, per_token=True)


def dpo(chosen: SideScores, rejected: SideScores, *, beta: float) -> Objective:
    """DPO (Rafailov et al. 2023): summed log-probs, no constraint."""
    u = log_prob_difference(chosen, rejected, beta, per_token=False)
    u = u - reference_margin(chosen, rejected, beta, per_token=False)
    return _objective(u, chosen, rejected, beta, per_token=False)


def simpo(chosen: SideScores, rejected: SideScores, *, beta: float, gamma: float) -> Objective:
    """SimPO (Meng et al. 2024): averages against a constant margin, no reference."""
    u = log_prob_difference(chosen, rejected, beta, per_token=True) - gamma
    return _objective(u, chosen, rejected, beta, per_token=True)


def _objective(
    u: Tensor, chosen: SideScores, rejected: SideScores, beta: float, *, per_token: bool
) -> Objective:
    rewards = [
        beta * (_score(side, per_token) - _reference(side, per_token)).detach()
        for side in (chosen, rejected)
    ]
    return Objective(-F.logsigmoid(u), u.detach(), *rewards)


def _score(side: SideScores, per_token: bool) -> Tensor:
    return side.policy_logps / side.num_tokens if per_token else side.policy_logps


def _reference(side: SideScores, per_token: bool) -> Tensor:
    return side.reference_logps / side.num_tokens if per_token else side.reference_logps
