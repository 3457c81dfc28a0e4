"""Dictionaries that are no SAEs, and paths whose site is not known: refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fpo_core.errors import FPOError
from fpo_core.sae.coder import load_coder
from fpo_core.sae.source import declared_width, identify_sae, local_folder
from tests.fpo_core.sae_files import D_IN, D_SAE, tensor

STATE = {
    "W_enc": tensor(D_IN, D_SAE),
    "W_dec": tensor(D_SAE, D_IN, seed=1),
    "b_dec": tensor(D_IN),
    "b_enc": tensor(D_SAE, seed=2),
    "threshold": tensor(D_SAE, seed=3).abs(),
}


def scope(folder: Path) -> Path:
    """Write a ``params.npz`` of Gemma Scope."""
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in STATE.items()}
    np.savez(folder / "params.npz", **arrays)
    return folder


def scope_2(folder: Path, **config: Any) -> Path:
    """Write a ``params.safetensors`` of Gemma Scope 2, with a ``config.json`` if given."""
    folder.mkdir(parents=True)
    state = {name.replace("W_", "w_"): value for name, value in STATE.items()}
    save_file(state, folder / "params.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused(folder: Path, message: str) -> None:
    """Expect the same refusal from all that reads an SAE's files."""
    for read in (load_coder, local_folder):
        with pytest.raises(FPOError, match=message):
            read(folder)
    for read in (declared_width, identify_sae):
        with pytest.raises(FPOError, match=message):
            read(str(folder))


LEAF = "layer_2/width_16k/average_l0_20"
NO_SAES = [
    "gemma-scope-2b-pt-transcoders",
    "models--google--gemma-scope-2b-pt-transcoders/snapshots/a1",
    "gemma-scope-9b-it-crosscoders",
    "gemma-scope-2b-pt-novel",
    "transcoders",
    "my-Transcoder",
    "gemma-clt",
]


@pytest.mark.parametrize("above", NO_SAES)
def test_a_folder_of_gemma_scope_that_is_no_sae(tmp_path, above):
    word = above.split("/")[0].rpartition("-pt-")[2].rpartition("-it-")[2]
    refused(scope(tmp_path / above / LEAF), word)


@pytest.mark.parametrize(
    ("above", "hook"),
    [
        ("gemma-scope-2b-pt-res", "blocks.2.hook_resid_post"),
        ("gemma-scope-2b-pt-res-canonical", "blocks.2.hook_resid_post"),
        ("transcoder-study/gemma-scope-2b-pt-mlp", "blocks.2.hook_mlp_out"),
        ("gemma-scope-9b-it-att", "blocks.2.attn.hook_z"),
        ("mine", "blocks.2"),
    ],
)
def test_a_folder_of_gemma_scope_that_is_an_sae(tmp_path, above, hook):
    assert load_coder(scope(tmp_path / above / LEAF)).hook == hook


def sparse(folder: Path, **config: Any) -> Path:
    """Write a folder of sparsify's."""
    folder.mkdir(parents=True)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    state = {name: STATE[name] for name in names}
    state["encoder.weight"] = state.pop("W_enc").T.contiguous()
    state["encoder.bias"] = state.pop("b_enc")
    save_file(state, folder / "sae.safetensors")
    given = {"d_in": D_IN, "expansion_factor": D_SAE // D_IN, "k": 5, **config}
    (folder / "cfg.json").write_text(json.dumps(given))
    return folder


def test_a_folder_of_sparsify_that_does_not_say_whether_it_is_an_sae(tmp_path):
    """Its configurations name ``transcode`` since a later version; then they are believed."""
    place = "org__skip-transcoders-64x--layers.2.mlp"
    refused(sparse(tmp_path / "old" / place), "holds transcoders")
    assert load_coder(sparse(tmp_path / "new" / place, transcode=False)).hook == "layers.2.mlp"
    assert load_coder(sparse(tmp_path / "older" / "layers.2")).hook == "layers.2"


LEAF_2 = "layer_5_width_16k_l0_small"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("gemma-scope-2-1b-pt/transcoder", "'transcoder', transcoders"),
        ("gemma-scope-2-1b-pt/transcoder_all", "'transcoder_all', transcoders"),
        ("gemma-scope-2-1b-pt/clt", "'clt', transcoders"),
        ("gemma-scope-2-1b-pt/resid_mid", "'resid_mid', an unknown site"),
        ("models--google--gemma-scope-2-1b-pt/snapshots/a1/novel", "'novel', an unknown site"),
        ("transcoders", "its folder 'transcoders' holds transcoders"),
    ],
)
def test_a_folder_of_gemma_scope_2_that_is_no_sae(tmp_path, place, message):
    refused(scope_2(tmp_path / place / LEAF_2), message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"affine_connection": True}, "affine_connection=true"),
        ({"type": "transcoder"}, "type 'transcoder'"),
        ({"hf_hook_point_in": "a", "hf_hook_point_out": "b"}, r"a transcoder \(to b\)"),
        ({"architecture": "gated"}, "architecture 'gated'"),
    ],
)
def test_what_gemma_scope_2_declares_and_is_no_sae(tmp_path, config, message):
    refused(scope_2(tmp_path / "resid_post" / LEAF_2, **config), message)


def test_an_sae_of_gemma_scope_2_says_so(tmp_path):
    config = {
        "type": "sae",
        "affine_connection": False,
        "hf_hook_point_in": "model.layers.5.output",
    }
    coder = load_coder(scope_2(tmp_path / "resid_post" / LEAF_2, **config))
    assert (coder.hook, coder.hf_hook) == ("blocks.5.hook_resid_post", "model.layers.5.output")
    assert coder.encode(torch.zeros(2, D_IN)).shape == (2, D_SAE)
