"""The logit lens beside the model itself, and norms that write their weight in different ways."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from explorer import open_store
from explorer.errors import NotThere
from explorer.logits import LogitLens, _through
from fpo_core.sae.coder import load_coder

D = 16


@pytest.fixture
def cache(browsed):
    return open_store(browsed).features("tiny")


def test_the_effect_is_the_models_own_head_on_the_decoders_row(browsed, cache):
    lens = LogitLens(open_store(browsed).store, cache)
    model = AutoModelForCausalLM.from_pretrained(cache.sae.model, dtype=torch.float64)
    decoder = load_coder(Path(cache.sae.source)).W_dec
    assert decoder is not None
    for feature in (0, 57):
        direction = decoder[feature].double() * model.get_decoder().norm.weight
        logits = model.lm_head(direction).detach().numpy()
        order = np.argsort(-logits)
        found = lens.effect(feature, top=5)
        assert [one.effect for one in found.raised] == pytest.approx(logits[order[:5]], rel=1e-4)
        assert [one.effect for one in found.lowered] == pytest.approx(
            logits[order[:-6:-1]], rel=1e-4
        )
        named = [cache.detokenizer.pieces([int(token)])[0] for token in order[:5]]
        assert [one.text for one in found.raised] == [one.replace(" ", "␣") for one in named]
    with pytest.raises(NotThere, match="no feature 96"):
        lens.effect(96)


@pytest.mark.parametrize("kind", [nn.LayerNorm, LlamaRMSNorm, Gemma2RMSNorm])
def test_a_norms_weight_is_found_however_it_is_written(kind):
    """Beside the derivative of the norm where it divides by 1."""
    torch.manual_seed(0)
    norm = kind(D).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    direction = torch.randn(D, dtype=torch.float64)
    # A point of mean 0 and variance 1 that the direction (less its mean) leaves at a right angle:
    # the division changes in no first order there.
    mean = direction.mean() if kind is nn.LayerNorm else 0.0
    along = torch.stack([direction - mean, torch.ones(D, dtype=torch.float64)])
    point = torch.randn(D, dtype=torch.float64)
    point = point - along.T @ torch.linalg.lstsq(along.T, point[:, None]).solution[:, 0]
    point = point / point.pow(2).mean().sqrt()
    expected = torch.func.jvp(lambda x: norm(x[None])[0], (point,), (direction,))[1]
    torch.testing.assert_close(_through(norm, direction), expected, rtol=1e-4, atol=1e-5)


def test_without_the_model_it_is_said(browsed, cache):
    cache.sae = cache.sae._replace(model="some/other-model")
    with pytest.raises(NotThere, match="the model of this cache is not on this machine"):
        LogitLens(open_store(browsed).store, cache)


def test_another_sae_under_the_same_name_is_refused(browsed, cache):
    cache.sae = cache.sae._replace(identity="sae:other")
    with pytest.raises(NotThere, match="is not the one of this cache"):
        LogitLens(open_store(browsed).store, cache)
