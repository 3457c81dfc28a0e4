"""The objectives against hand-worked numbers and the paper's Table 1 written out in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.objectives import SideScores, objective
from fpo_core.recipe.methods import METHODS, Method
from fpo_core.recipe.options import Options, objective_options
from fpo_core.recipe.training import TrainSettings

CHOSEN = SideScores(
    torch.tensor([-10.0], dtype=torch.float64), torch.tensor([-12.0], dtype=torch.float64),
    torch.tensor([5]), torch.tensor([0.5]),
)  # fmt: skip
REJECTED = SideScores(
    torch.tensor([-9.0], dtype=torch.float64), torch.tensor([-8.0], dtype=torch.float64),
    torch.tensor([2]), torch.tensor([0.25]),
)  # fmt: skip


def run(name, chosen=CHOSEN, rejected=REJECTED, **given):
    return objective(
        METHODS[name], objective_options(TrainSettings(method=name, **given)), chosen, rejected
    )


def loss_of(u):
    return math.log1p(math.exp(-u))


@pytest.mark.parametrize(
    ("name", "u"),
    [
        # beta * ((S_w - S_l) - (Sref_w - Sref_l)) = 0.1 * ((-10 + 9) - (-12 + 8))
        ("dpo", 0.3),
        # twice the difference of -10/5 and -9/2, less 0.5
        ("simpo", 4.5),
        # averages -2 and -4.5, for the reference -2.4 and -4; divergences 0.5 and 0.25
        ("fpo", 0.25 - 0.16 - 0.5 * 0.1 * (0.25 - 0.5)),
        ("tdpo1", 0.3 - 0.1 * (0.25 - 0.5)),
        ("tdpo2", 0.3 - 0.5 * 0.1 * (0.25 - 0.5)),
        # K-bar: 0.5 / 5 and 0.25 / 2
        ("simpo_kl", 4.5 - 0.5 * 2 * (0.125 - 0.1)),
    ],
)
def test_by_hand(name, u):
    result = run(name)
    assert result.u.item() == pytest.approx(u, abs=1e-7)
    assert result.losses.item() == pytest.approx(loss_of(u), abs=1e-7)
    parts = result.difference - result.margin - result.constraint
    assert parts.item() == pytest.approx(u, abs=1e-7)


def test_sft_is_the_chosen_sides_cross_entropy_a_token():
    assert run("sft").losses.item() == 2.0


def test_implicit_rewards_by_hand():
    result = run("dpo")
    assert result.chosen_rewards.item() == pytest.approx(0.2)
    assert result.rejected_rewards.item() == pytest.approx(-0.1)
    averaged = run("fpo")
    assert averaged.chosen_rewards.item() == pytest.approx(0.1 * (-2 + 2.4))


def table_1(name, sides, beta, gamma, alpha, stop, per_token):
    """The paper's Table 1, row by row, in float64, from its words and not from our code."""
    (sw, rw, nw, xw), (sl, rl, nl, xl) = [[t.double() for t in side] for side in sides]
    if name == "sft":
        return -sw / nw
    if per_token:
        sw, sl, rw, rl = sw / nw, sl / nl, rw / nw, rl / nl
        if name in ("tdpo1", "tdpo2", "simpo_kl"):
            xw, xl = xw / nw, xl / nl
    lpd = beta * sw - beta * sl
    margin = gamma if name in ("simpo", "simpo_kl") else beta * rw - beta * rl
    xw = xw.detach() if stop else xw
    delta = {
        "dpo": 0.0, "simpo": 0.0, "tdpo1": beta * (xl - xw),
    }.get(name, (alpha or 0.0) * (beta * xl - beta * xw))  # fmt: skip
    return -torch.nn.functional.logsigmoid(lpd - margin - delta)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(METHODS)), pairs=st.integers(1, 6), seed=st.integers(0, 10**6),
    beta=st.sampled_from([None, 0.01, 3.0]), size=st.sampled_from([1e-3, 1.0, 1e4]),
    stop=st.sampled_from([None, True, False]), norm=st.sampled_from([None, True, False]),
    dtype=st.sampled_from([torch.float64, torch.float32]), one_token=st.booleans(),
)  # fmt: skip
def test_values_and_gradients_equal_table_1(
    name, pairs, seed, beta, size, stop, norm, dtype, one_token
):
    """Up to log-probs of -1e4 a response, one-token responses and single precision."""
    draw = torch.Generator().manual_seed(seed)

    def side():
        counts = torch.ones(pairs) if one_token else torch.randint(
            1, 400, (pairs,), generator=draw
        ).float()  # fmt: skip
        values = [size * torch.rand(pairs, generator=draw) for _ in range(3)]
        return [-values[0], -values[1], counts, values[2]]

    raw = [side(), side()]
    given_ = TrainSettings(method=name, beta=beta, stop_gradient=stop, length_norm=norm)
    options = objective_options(given_)
    leaves = {}
    results = []
    for kind in ("ours", "paper"):
        precision = dtype if kind == "ours" else torch.float64
        sides = [
            [t.to(precision).clone().requires_grad_(i in (0, 3)) for i, t in enumerate(side_)]
            for side_ in raw
        ]
        leaves[kind] = [side_[i] for side_ in sides for i in (0, 3)]
        if kind == "ours":
            losses = objective(METHODS[name], options, *(SideScores(*s) for s in sides)).losses
        else:
            losses = table_1(name, sides, *options)
        losses.sum().backward()
        results.append(losses.detach().double())
    scale = max(1.0, float(results[1].abs().max()))
    assert (results[0] - results[1]).abs().max() <= (
        1e-9 if dtype == torch.float64 else 2e-5
    ) * scale
    for got, want in zip(leaves["ours"], leaves["paper"], strict=True):
        zero = torch.zeros_like(want)
        ours, theirs = (zero if g.grad is None else g.grad.double() for g in (got, want))
        tolerance = 1e-9 if dtype == torch.float64 else 3e-3
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def test_stop_gradient_holds_the_chosen_divergence():
    for stop, expected in ((True, 0.0), (False, 1.0), (None, 0.0)):
        chosen, rejected = (s.divergence.clone().requires_grad_() for s in (CHOSEN, REJECTED))
        result = run(
            "fpo", CHOSEN._replace(divergence=chosen), REJECTED._replace(divergence=rejected),
            stop_gradient=stop,
        )  # fmt: skip
        result.losses.sum().backward()
        assert rejected.grad.item() > 0  # lowering D_l lowers the loss
        got = 0.0 if chosen.grad is None else -chosen.grad.item() / rejected.grad.item()
        assert got == pytest.approx(expected)


def test_policy_equal_to_reference_gives_log_2():
    same = [
        side._replace(policy_logps=side.reference_logps, divergence=torch.zeros(1))
        for side in (CHOSEN, REJECTED)
    ]
    for name in ("dpo", "fpo", "tdpo1", "tdpo2"):
        result = run(name, *same)
        assert result.u.item() == 0
        assert result.losses.item() == pytest.approx(math.log(2))


def test_an_objective_of_ones_own_is_one_entry(monkeypatch):
    """As the documentation shows it: FPO's constraint against SimPO's margin."""
    mine = Method("mean", "gamma", "features", held=True, beta=2.0, gamma=0.5, alpha=0.5)
    monkeypatch.setitem(METHODS, "fpo_gamma", mine)
    options = objective_options(TrainSettings(method="fpo_gamma", alpha=1.0))
    assert options == Options(2.0, 0.5, 1.0, stop_gradient=True, per_token=True)
    result = objective(mine, options, CHOSEN, REJECTED)
    assert result.u.item() == pytest.approx(2 * (-2 + 4.5) - 0.5 - 1.0 * 2 * (0.25 - 0.5))
