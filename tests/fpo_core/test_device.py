"""The stages' passes on a device that is not the CPU give what they give on the CPU.

On a GPU where there is one; everywhere else on a made device that refuses to mix with the CPU.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fpo_core.evaluation.audit import Groups
from fpo_core.evaluation.heldout import BY_PAIR, score_heldout
from fpo_core.generation.answers import Prompt, Sampling
from fpo_core.generation.entropy import mean_entropy
from fpo_core.generation.transformers_backend import TransformersBackend
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.budget import TokenBudget
from fpo_core.models.load import inference_device
from fpo_core.offline import WantedFeatures, score_shard
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import AttachedSae, load_coder
from fpo_core.sae.collect import collect_activations
from fpo_core.sae.quality import sae_quality
from fpo_core.training.examples import Example
from fpo_core.training.feature_shards import CachedSide, PooledFeatures
from tests.other_device import DEVICE, other_device
from tests.tiny import D_SAE, SAE_LAYER, make_model, make_tokenizer, save_sae

SETTINGS = FeatureSettings(cache_k=10, tokens_k=4, examples=3)
SAES = {
    "jumprelu": {},
    "topk": {"architecture": "topk", "k": 9},
}  # fmt: skip


class Device(NamedTuple):
    name: str
    context: Any


@pytest.fixture(params=["strict", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "strict":
        return Device(str(DEVICE), other_device())
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return Device("cuda", nullcontext())


def eager(kind: str, seed: int = 0) -> Any:
    model = make_model(kind, seed)
    model.set_attn_implementation("eager")  # the made device has no kernel of attention
    return model


def close(one: Any, other: Any) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(
            np.asarray(left, np.float64), np.asarray(right, np.float64), atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("sae_kind", SAES)
@pytest.mark.parametrize("want_reference", [True, False])
def test_the_offline_pass(device, kind, sae_kind, want_reference, pairs, tmp_path):
    coder = load_coder(save_sae(tmp_path, **SAES[sae_kind]))

    def score(name):
        wanted = WantedFeatures(coder.to(name), Hookpoint(SAE_LAYER), SETTINGS, (3, 70))
        return score_shard(
            eager(kind).to(name), pairs, [wanted], want_reference=want_reference,
            budget=TokenBudget(64),
        )  # fmt: skip

    expected = score("cpu")
    with device.context:
        found = score(device.name)
    if want_reference:
        close(found.reference["chosen_logp"], expected.reference["chosen_logp"])
    (found,), (expected,) = found.features, expected.features
    for name in ("values", "nonzero", "mass", "cutoff", "pinned_values"):
        close(found.pooled[name], expected.pooled[name])
    for name in ("values", "token_id", "position", "nonzero", "mass"):
        close(found.tokens[name], expected.tokens[name])
    for name in ("active", "total", "max", "total_chosen", "total_rejected", "example_values"):
        close(found.stats[name], expected.stats[name])


def test_held_out_pairs_and_answers(device, pairs, tmp_path):
    coder = load_coder(save_sae(tmp_path))
    sides = [
        CachedSide(PooledFeatures(np.arange(4), np.ones(4, np.float32), 0.5, np.zeros(0)), None)
        for _ in range(2)
    ]
    examples = [Example(pair, (-3.0, -4.0), (tuple(sides),)) for pair in pairs]

    def measure(name):
        policy, reference = (eager("llama", seed).to(name) for seed in (5, 0))
        scores = score_heldout(
            policy, reference, examples, AttachedSae(coder.to(name), Hookpoint(SAE_LAYER)),
            Groups({"one": [1, 2]}, D_SAE), k=4, tokens_per_batch=64,
        )  # fmt: skip
        prompts = [
            Prompt(pair.pair_id, 0, temperature, 0, seed, (), pair.prompt)
            for temperature in (0.0, 1.0)
            for seed, pair in enumerate(pairs)
        ]
        backend = TransformersBackend(
            policy, make_tokenizer(), Sampling(5, 0.9, (1,)), TokenBudget(64)
        )
        answers = {
            (a.prompt.question_id, a.prompt.temperature): a for a in backend.generate(prompts)
        }
        entropies = [
            mean_entropy(policy, prompt.ids, answers[prompt.question_id, 0.0].answer_ids)
            for prompt in prompts[: len(pairs)]
        ]
        return scores, {name: one.answer_ids for name, one in answers.items()}, entropies

    expected, answers, entropies = measure("cpu")
    with device.context:
        found, on_device, found_entropies = measure(device.name)
    for name in BY_PAIR:
        assert isinstance(getattr(found, name), np.ndarray)
        close(getattr(found, name), getattr(expected, name))
    for here, there in zip(found.features[1:], expected.features[1:], strict=True):
        close(here, there)
    assert on_device == answers
    close(found_entropies, entropies)


def test_activations_and_quality_of_an_sae(device, tmp_path):
    windows = torch.randint(2, 400, (6, 12), generator=torch.Generator().manual_seed(0))
    coder = load_coder(save_sae(tmp_path / "sae"))

    def measure(name, folder):
        model = eager("llama").to(name)
        place = Hookpoint(SAE_LAYER)
        collected = collect_activations(model, windows, place, folder)
        return collected, sae_quality(model, coder.to(name), place, windows)

    activations, quality = measure("cpu", tmp_path / "a")
    with device.context:
        found, its_quality = measure(device.name, tmp_path / "b")
    np.testing.assert_allclose(found[:], activations[:], atol=2e-2)
    # A random model's loss hardly needs the activations: no share of it is recovered.
    assert its_quality.pop("loss_recovered") is quality.pop("loss_recovered") is None
    assert its_quality == pytest.approx(quality, rel=1e-3, abs=1e-4)


def test_the_device_is_the_gpu_where_there_is_one():
    assert torch.zeros(1, device=inference_device()).is_cuda == torch.cuda.is_available()


def test_the_made_device_refuses_what_a_gpu_refuses():
    with other_device():
        there, here = torch.arange(3.0, device=DEVICE), torch.ones(3)
        assert (there + 1).cpu().tolist() == [1.0, 2.0, 3.0]
        for mixed in (lambda: there + here, lambda: torch.cat([here, there]), there.numpy):
            with pytest.raises(RuntimeError):
                mixed()
