"""Held-out metrics and sampled answers against plain computations."""

import numpy as np
import pytest
import torch

from fpo_core.evaluation.audit import Groups, MomentSums, audit_moments
from fpo_core.evaluation.heldout import HeldoutScores, score_heldout
from fpo_core.evaluation.metrics import METRICS, bootstrap_draws, estimate, heldout_metrics
from fpo_core.generation.entropy import mean_entropy
from fpo_core.hookpoint import Hookpoint
from fpo_core.sae.coder import AttachedSae, load_coder
from fpo_core.training.examples import Example
from fpo_core.training.feature_shards import CachedSide, PooledFeatures
from tests.fpo_core.test_offline import plain, score
from tests.tiny import D_SAE, SAE_LAYER, make_model


@pytest.fixture
def examples(pairs, sae):
    """Held-out examples with the reference side as the offline pass caches it."""
    scores = score(make_model(), pairs, sae)
    assert scores.reference is not None
    pooled = scores.features[0].pooled
    stored = [
        CachedSide(
            PooledFeatures(
                np.asarray(indices), np.asarray(values, dtype=np.float32), cutoff, np.zeros(0)
            ),
            None,
        )
        for indices, values, cutoff in zip(
            pooled["indices"], pooled["values"], pooled["cutoff"], strict=True
        )
    ]
    logps = zip(scores.reference["chosen_logp"], scores.reference["rejected_logp"], strict=True)
    return [
        Example(pair, (float(chosen), float(rejected)), ((stored[2 * n], stored[2 * n + 1]),))
        for n, (pair, (chosen, rejected)) in enumerate(zip(pairs, logps, strict=True))
    ]


GROUPS = Groups({"one": [1, 2], "other": [7]}, D_SAE, [("one", "other")])


def attached(sae):
    return AttachedSae(load_coder(sae), Hookpoint(SAE_LAYER))


def test_scores_equal_the_plain_computation(examples, sae):
    policy, reference = make_model(seed=5), make_model()
    found = score_heldout(
        policy, reference, examples, attached(sae), GROUPS, k=8, tokens_per_batch=40
    )
    for row, example in enumerate(examples):
        for side, response in enumerate((example.ids.chosen, example.ids.rejected)):
            response = list(response)
            logp, _ = plain(make_model(seed=5), example.ids.prompt, response)
            assert found.policy_logps[row, side] == pytest.approx(logp, abs=2e-4)
            assert found.tokens[row, side] == len(response)
            for seed, entropy in ((5, found.policy_entropy), (0, found.reference_entropy)):
                want = plain_entropy(seed, example.ids.prompt, response)
                assert entropy[row, side] == pytest.approx(want, rel=1e-4)
            kl = plain_kl(example.ids.prompt, response)
            assert found.kl[row, side] == pytest.approx(kl, rel=1e-3)
    pairs = [example.ids for example in examples]
    features, groups = audit_moments(
        policy, reference, pairs, attached(sae), GROUPS, tokens_per_batch=40
    )
    np.testing.assert_allclose(found.features.policy, features.policy, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.groups.squares, groups.squares, rtol=1e-5, atol=1e-9)
    assert found.features.responses == len(examples)
    one, other, apart = found.groups.change.T
    np.testing.assert_allclose(one, found.features.change[:, [1, 2]].mean(1), atol=1e-12)
    np.testing.assert_allclose(apart, one - other, atol=1e-12)
    assert (found.discrepancy > 0).all()


def plain_entropy(seed, prompt, response) -> float:
    """Summed over scored positions, from full logits in float64."""
    with torch.no_grad():
        logits = (
            make_model(seed=seed).double()(input_ids=torch.tensor([[*prompt, *response]])).logits
        )
    scored = torch.distributions.Categorical(logits=logits[0, len(prompt) - 1 : -1])
    return float(scored.entropy().sum())


def plain_kl(prompt, response) -> float:
    """Sum over scored positions of KL(reference || policy), from full logits in float64."""
    ids = torch.tensor([[*prompt, *response]])
    logps = []
    for seed in (0, 5):
        with torch.no_grad():
            logits = make_model(seed=seed).double()(input_ids=ids).logits[0]
        logps.append(torch.log_softmax(logits[len(prompt) - 1 : -1], -1))
    return float((logps[0].exp() * (logps[0] - logps[1])).sum())


def test_the_reference_measured_against_itself_is_at_zero(examples, sae):
    found = score_heldout(
        make_model(), make_model(), examples, attached(sae), GROUPS, k=8, tokens_per_batch=40
    )
    np.testing.assert_allclose(found.policy_logps, found.reference_logps, atol=1e-4)
    np.testing.assert_allclose(found.kl, 0, atol=1e-5)
    np.testing.assert_allclose(found.discrepancy, 0, atol=1e-8)


def scores_by_hand() -> HeldoutScores:
    return HeldoutScores(
        ["a", "b"],
        tokens=np.array([[2.0, 4.0], [1.0, 2.0]]),
        policy_logps=np.array([[-2.0, -8.0], [-3.0, -2.0]]),
        reference_logps=np.array([[-4.0, -6.0], [-4.0, -4.0]]),
        kl=np.array([[1.0, 2.0], [3.0, 6.0]]),
        policy_entropy=np.array([[2.0, 8.0], [1.0, 6.0]]),
        reference_entropy=np.array([[4.0, 8.0], [2.0, 8.0]]),
        discrepancy=np.array([[0.1, 0.3], [0.5, 0.7]]),
        features=MomentSums(3).moments(), groups=MomentSums(0).moments(),
    )  # fmt: skip


def test_metrics_by_hand():
    found = {metric.key: metric for metric in heldout_metrics(scores_by_hand(), 100, 0)}
    assert set(found) == set(METRICS)
    # Averages: policy -1 and -2, then -3 and -1; reference -2 and -1.5, then -4 and -2.
    assert found["accuracy"].policy.value == 0.5
    assert found["accuracy"].reference.value == 0.0
    assert found["accuracy"].difference.value == 0.5
    assert found["margin"].policy.value == pytest.approx((1 - 2) / 2)
    # Rewards: +2 and -2, then +1 and +2.
    assert found["reward_accuracy"].policy.value == 0.5
    assert found["kl_chosen"].policy.value == 2.0
    assert found["discrepancy"].policy.value == pytest.approx((0.2 + 0.6) / 2)


def test_intervals_equal_scipys_percentile_bootstrap():
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).exponential(size=60)
    ours = estimate(values, bootstrap_draws(60, 20_000, seed=1))
    theirs = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours.value == values.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_entropy_is_that_of_the_untempered_distribution():
    model = make_model()
    prompt, answer = [5, 6, 7], [20, 30, 40, 50]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    p = torch.softmax(logits[len(prompt) - 1 : -1], -1)
    expected = float(-(p * p.log()).sum(-1).mean())
    assert mean_entropy(model, prompt, answer) == pytest.approx(expected, rel=1e-5)
