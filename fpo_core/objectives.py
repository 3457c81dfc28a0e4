"""The objectives, composed as in the paper's Table 1.

Every preference objective is u = log-prob difference - margin - constraint with loss
-log sigmoid(u); ``fpo_core/recipe/methods.py`` says which parts each has. S is a response's summed
log-prob, n its scored tokens, A = S / n. Pure functions of tensors; nothing is reduced.

Shapes: B pairs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fpo_core.recipe.methods import Method
from fpo_core.recipe.options import Options


class SideScores(NamedTuple):
    """What one side (chosen or rejected) of a batch brings to the objective."""

    policy_logps: Tensor  # [B] summed, with gradient
    reference_logps: Tensor  # [B] summed
    num_tokens: Tensor  # [B]
    divergence: Tensor | None = None  # [B] K summed over tokens, or D; with gradient


class Objective(NamedTuple):
    """Unreduced losses, and the quantities that explain them, detached."""

    losses: Tensor  # [B]
    u: Tensor  # [B]
    difference: Tensor  # [B] the three parts of u
    margin: Tensor  # [B]
    constraint: Tensor  # [B]
    chosen_rewards: Tensor  # [B] implicit rewards
    rejected_rewards: Tensor  # [B]


def objective(
    method: Method, options: Options, chosen: SideScores, rejected: SideScores
) -> Objective:
    """The losses of a batch under an objective.

    Args:
        method: which parts it has.
        options: its numbers.
        chosen: scores of the chosen responses.
        rejected: of the rejected ones.

    Raises:
        ValueError: the objective has a constraint and a side brings no divergence.
    """
    if method.difference is None:
        return supervised(chosen, rejected, options)
    difference = log_prob_difference(chosen, rejected, options.beta, per_token=options.per_token)
    if method.margin == "reference":
        margin = reference_margin(chosen, rejected, options.beta, per_token=options.per_token)
    else:
        margin = torch.full_like(difference, options.gamma or 0.0)
    held = torch.zeros_like(difference)
    if method.constraint:
        held = constraint(
            _divergence(chosen, method, options), _divergence(rejected, method, options),
            options.beta, options.alpha, stop_gradient=options.stop_gradient,
        )  # fmt: skip
    u = difference - margin - held
    return _objective(-F.logsigmoid(u), (u, difference, margin, held), chosen, rejected, options)


def log_prob_difference(
    chosen: SideScores, rejected: SideScores, beta: float, *, per_token: bool
) -> Tensor:
    """beta * (S_w - S_l), or with averages A where ``per_token``."""
    return beta * (_policy(chosen, per_token) - _policy(rejected, per_token))


def reference_margin(
    chosen: SideScores, rejected: SideScores, beta: float, *, per_token: bool
) -> Tensor:
    """The same difference under the reference: what the log-prob difference must exceed."""
    return beta * (_reference(chosen, per_token) - _reference(rejected, per_token))


def constraint(
    chosen: Tensor, rejected: Tensor, beta: float, alpha: float | None, *, stop_gradient: bool
) -> Tensor:
    """alpha * (beta * X_l - sg(beta * X_w)) of a divergence X: K (TDPO) or D (FPO).

    ``alpha`` None is 1, as in TDPO-1, which also has no stop-gradient.
    """
    kept = chosen.detach() if stop_gradient else chosen
    return (1.0 if alpha is None else alpha) * (beta * rejected - beta * kept)


def supervised(chosen: SideScores, rejected: SideScores, options: Options) -> Objective:
    """SFT: the chosen response's cross-entropy, averaged over its tokens; u is 0."""
    nothing = torch.zeros_like(chosen.policy_logps)
    losses = -_policy(chosen, per_token=True)
    return _objective(losses, (nothing, nothing, nothing, nothing), chosen, rejected, options)


def _divergence(side: SideScores, method: Method, options: Options) -> Tensor:
    if side.divergence is None:
        raise ValueError(
            f"the objective constrains {method.constraint}: both sides need SideScores.divergence"
        )
    if method.constraint == "kl" and options.per_token:
        return side.divergence / side.num_tokens  # K-bar of SimPO with KL
    return side.divergence


def _objective(
    losses: Tensor,
    parts: tuple[Tensor, Tensor, Tensor, Tensor],
    chosen: SideScores,
    rejected: SideScores,
    options: Options,
) -> Objective:
    rewards = [
        options.beta * (_policy(side, options.per_token) - _reference(side, options.per_token))
        for side in (chosen, rejected)
    ]
    return Objective(losses, *(part.detach() for part in (*parts, *rewards)))


def _policy(side: SideScores, per_token: bool) -> Tensor:
    return side.policy_logps / side.num_tokens if per_token else side.policy_logps


def _reference(side: SideScores, per_token: bool) -> Tensor:
    return side.reference_logps / side.num_tokens if per_token else side.reference_logps
