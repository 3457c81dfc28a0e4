"""The objectives against hand-worked numbers and the invariant at step 0."""

import math

import torch

from fpo_core import objectives
from fpo_core.objectives import SideScores

CHOSEN = SideScores(
    torch.tensor([-10.0], dtype=torch.float64), torch.tensor([-12.0], dtype=torch.float64),
    torch.tensor([5]), torch.tensor([0.5]),
)  # fmt: skip
REJECTED = SideScores(
    torch.tensor([-9.0], dtype=torch.float64), torch.tensor([-8.0], dtype=torch.float64),
    torch.tensor([2]), torch.tensor([0.25]),
)  # fmt: skip


def loss_of(u):
    return math.log1p(math.exp(-u))


def test_dpo_by_hand():
    # beta * ((S_w - S_l) - (Sref_w - Sref_l)) = 0.1 * ((-10 + 9) - (-12 + 8))
    result = objectives.dpo(CHOSEN, REJECTED, beta=0.1)
    torch.testing.assert_close(result.u.item(), 0.3)
    torch.testing.assert_close(result.losses.item(), loss_of(0.3))
    torch.testing.assert_close(result.chosen_rewards.item(), 0.2)
    torch.testing.assert_close(result.rejected_rewards.item(), -0.1)


def test_simpo_by_hand():
    # by hand: twice the difference of -10/5 and -9/2, less 0.5
    result = objectives.simpo(CHOSEN, REJECTED, beta=2.0, gamma=0.5)
    torch.testing.assert_close(result.u.item(), 4.5)
    torch.testing.assert_close(result.losses.item(), loss_of(4.5))


def test_fpo_by_hand():
    # averages -2 and -4.5, for the reference -2.4 and -4; discrepancies 0.5 and 0.25
    result = objectives.fpo(CHOSEN, REJECTED, beta=0.1, alpha=0.5, stop_gradient=True)
    torch.testing.assert_close(result.u.item(), 0.25 - 0.16 + 0.0125)


def test_stop_gradient_holds_the_chosen_discrepancy():
    for stop, expected in ((True, 0.0), (False, 1.0)):
        chosen, rejected = (s.discrepancy.clone().requires_grad_() for s in (CHOSEN, REJECTED))
        result = objectives.fpo(
            CHOSEN._replace(discrepancy=chosen), REJECTED._replace(discrepancy=rejected),
            beta=0.1, alpha=0.5, stop_gradient=stop,
        )  # fmt: skip
        result.losses.sum().backward()
        assert rejected.grad.item() > 0  # lowering D_l lowers the loss
        got = 0.0 if chosen.grad is None else -chosen.grad.item() / rejected.grad.item()
        torch.testing.assert_close(got, expected)


def test_policy_equal_to_reference_gives_log_2():
    same = [
        side._replace(policy_logps=side.reference_logps, discrepancy=torch.zeros(1))
        for side in (CHOSEN, REJECTED)
    ]
    for result in (
        objectives.dpo(*same, beta=0.1),
        objectives.fpo(*same, beta=0.1, alpha=0.5, stop_gradient=True),
    ):
        assert result.u.item() == 0
        torch.testing.assert_close(result.losses.item(), math.log(2))
