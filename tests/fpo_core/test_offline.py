"""The offline pass against the plain model in float64 and sae-lens' encoder, pair by pair."""

import numpy as np
import pytest
import torch

from fpo_core.features.stats import merge_stats
from fpo_core.hookpoint import Hookpoint
from fpo_core.offline import score_shard
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import load_coder
from tests.tiny import D_SAE, SAE_LAYER, make_model

SETTINGS = FeatureSettings(cache_k=10, tokens_k=4, examples=3)


def score(model, pairs, sae, *, budget=64, want_reference=True, coder=True):
    return score_shard(
        model, pairs, Hookpoint(SAE_LAYER),
        coder=load_coder(sae) if coder else None, features=SETTINGS,
        want_reference=want_reference, tokens_per_batch=budget,
    )  # fmt: skip


def plain(model, prompt, response):
    """Summed log-prob and SAE input of one response, by an ordinary forward pass in float64."""
    model = model.double()
    ids = torch.tensor([[*prompt, *response]])
    seen = []
    handle = model.model.layers[SAE_LAYER].register_forward_hook(
        lambda *call: seen.append(call[2] if isinstance(call[2], torch.Tensor) else call[2][0])
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    handle.remove()
    positions = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    logp = torch.log_softmax(logits[positions], -1)[torch.arange(len(response)), response].sum()
    return float(logp), seen[0][0][positions].float()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_tables_equal_the_plain_computation(kind, pairs, sae):
    from sae_lens import SAE

    theirs = SAE.load_from_disk(sae, device="cpu", dtype="float32")
    scores = score(make_model(kind), pairs, sae)
    reference, pooled, tokens, stats = scores
    for columns in scores:
        assert columns is not None
    model = make_model(kind)
    every, row, token = [], 0, 0
    for number, pair in enumerate(pairs):
        for side in ("chosen", "rejected"):
            response = list(getattr(pair, side))
            logp, x = plain(model, pair.prompt, response)
            assert reference[f"{side}_logp"][number] == pytest.approx(logp, abs=2e-4)
            assert reference[f"{side}_tokens"][number] == len(response)
            with torch.no_grad():
                acts = theirs.encode(x)
            mean = acts.mean(0)
            order = torch.sort(mean, descending=True, stable=True)
            positive = int((mean > 0).sum())
            stored = min(positive, SETTINGS.cache_k)
            assert pooled["pair_id"][row] == pair.pair_id
            assert pooled["side"][row] == side
            np.testing.assert_allclose(pooled["values"][row], order.values[:stored], atol=1e-4)
            np.testing.assert_allclose(
                pooled["values"][row], mean[pooled["indices"][row].astype(int)], atol=1e-4
            )
            assert pooled["nonzero"][row] == positive
            assert pooled["mass"][row] == pytest.approx(float(mean.sum()), rel=1e-4)
            left = float(order.values[stored]) if positive > stored else 0.0
            assert pooled["cutoff"][row] == pytest.approx(left, abs=1e-4)
            for position, token_acts in enumerate(acts):
                assert tokens["token_id"][token] == response[position]
                assert tokens["position"][token] == position
                top = torch.topk(token_acts, SETTINGS.tokens_k).values
                np.testing.assert_allclose(tokens["values"][token], top[top > 0], atol=1e-4)
                token += 1
            every.append((side, acts))
            row += 1
    check_stats(stats, every)


def check_stats(stats, every):
    merged = merge_stats([stats], SETTINGS.examples)
    acts = torch.cat([found for _, found in every]).double().numpy()
    assert len(merged["feature"]) == D_SAE
    np.testing.assert_allclose(merged["density"], (acts > 0).mean(0), atol=0.02)
    np.testing.assert_allclose(merged["mean"], acts.mean(0), atol=1e-4)
    np.testing.assert_allclose(merged["max"], acts.max(0), atol=2e-4)
    for side in ("chosen", "rejected"):
        means = np.mean([found.numpy().mean(0) for name, found in every if name == side], axis=0)
        np.testing.assert_allclose(merged[f"mean_{side}"], means, atol=1e-4)
    for feature in range(0, D_SAE, 7):
        top = np.sort(acts[:, feature])[::-1][: SETTINGS.examples]
        found = [example["value"] for example in merged["examples"][feature]]
        np.testing.assert_allclose(found, top[top > 0][: len(found)], atol=2e-4)


def test_the_batch_size_changes_nothing_but_rounding(pairs, sae):
    small, large = (score(make_model(), pairs, sae, budget=budget) for budget in (1, 4096))
    np.testing.assert_allclose(
        small.reference["chosen_logp"], large.reference["chosen_logp"], atol=1e-4
    )
    for one, other in zip(small.pooled["values"], large.pooled["values"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_features_alone_are_bitwise_what_both_together_give(pairs, sae):
    both = score(make_model(), pairs, sae)
    alone = score(make_model(), pairs, sae, want_reference=False)
    assert alone.reference is None
    for one, other in zip(both.pooled["values"], alone.pooled["values"], strict=True):
        np.testing.assert_array_equal(one, other)
    reference = score(make_model(), pairs, sae, coder=False)
    assert reference.pooled is None
    np.testing.assert_array_equal(reference.reference["chosen_logp"], both.reference["chosen_logp"])


def test_statistics_of_shards_merge_to_those_of_the_whole(pairs, sae):
    whole = merge_stats([score(make_model(), pairs, sae).stats], SETTINGS.examples)
    parts = [score(make_model(), part, sae).stats for part in (pairs[:2], pairs[2:])]
    merged = merge_stats(parts, SETTINGS.examples)
    for name in ("density", "mean", "max", "mean_chosen", "mean_rejected"):
        np.testing.assert_allclose(merged[name], whole[name], atol=1e-4)
    for one, other in zip(merged["examples"], whole["examples"], strict=True):
        np.testing.assert_allclose(
            [example["value"] for example in one], [example["value"] for example in other],
            atol=2e-4,
        )  # fmt: skip
