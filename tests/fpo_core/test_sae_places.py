"""What stands at a path that is no SAE's folder, and settings that contradict each other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpo_core.errors import FPOError
from fpo_core.models.architectures import ARCHITECTURES
from fpo_core.sae.coder import load_coder
from fpo_core.sae.declared import Declared, declared_place
from fpo_core.sae.source import sae_folder
from tests.fpo_core.sae_files import D_IN, D_SAE, tensor, write


def said(place: Path) -> str:
    with pytest.raises(FPOError) as error:
        sae_folder(str(place))
    return str(error.value)


def test_each_wrong_place_has_a_message_of_its_own(tmp_path):
    sae = write(tmp_path / "runs/first/final_1000", "standard")
    assert "it does not exist. Check the path" in said(tmp_path / "nowhere")
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert f"it is a file of an SAE. Give its folder, {str(sae)!r}" in said(sae / file)
    for above in (tmp_path / "runs", tmp_path / "runs/first"):
        assert f"has SAEs in {str(sae)!r}. Give one of these" in said(above)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    assert "the folder is empty. Formats that are read: sae-lens (cfg.json" in said(foreign)
    for name in ("model.safetensors", "config.yaml"):
        (foreign / name).write_text("x")
    assert "it holds config.yaml, model.safetensors, which is no format" in said(foreign)
    assert "it is a file of an unknown format" in said(foreign / "config.yaml")
    (sae / "cfg.json").unlink()
    assert "it has sae_weights.safetensors without cfg.json" in said(sae)


def test_a_folder_of_many_saes_names_some(tmp_path):
    for index in range(9):
        write(tmp_path / f"layer_{index}", "standard")
    found = said(tmp_path)
    assert found.count("layer_") == 3
    assert "and more. Give one" in found


def test_a_place_of_fpo_says_how_to_make_it(tmp_path):
    assert "`fpo make-tiny-gemma` makes the folder" in said(tmp_path / "gemma2-tiny/sae")


@pytest.mark.parametrize(
    ("name", "architecture", "place"),
    [
        ("blocks.5.hook_out", "llama", Declared(5, "resid_post")),
        ("blocks.5.hook_out", "gemma2", Declared(5, "resid_post")),
        ("blocks.5.hook_in", "gpt2", Declared(4, "resid_post")),
        ("blocks.0.hook_in", "gpt2", None),
        ("blocks.5.mlp.hook_out", "llama", Declared(5, "mlp_out")),
        ("blocks.5.mlp.hook_out", "gemma2", None),  # before the norm that follows it
        ("blocks.5.ln2_post.hook_out", "gemma2", Declared(5, "mlp_out")),
        ("blocks.5.ln2_post.hook_out", "llama", None),
        ("blocks.5.attn.hook_out", "llama", None),
        ("blocks.5.mlp.hook_in", "llama", None),
        ("embed.hook_out", "llama", None),
        ("ln_final.hook_out", "llama", None),
    ],
)
def test_names_of_transformer_lens_3(name, architecture, place):
    assert declared_place(name, ARCHITECTURES[architecture]) == place


DISAGREE = {
    "hook_name='blocks.2.hook_resid_post' and hook_layer=7": {"hook_layer": 7},
    "hook_name='blocks.2.hook_resid_post' and hook_layer=3": {"hook_point_layer": 3},
    "hf_hook_name='model.layers.4.output' and hook_layer=2": {
        "hook_layer": 2,
        "hf_hook_name": "model.layers.4.output",
    },
    r"predicts 3 \(hook_layer_out\)": {"hook_layer": 2, "hook_layer_out": 3},
    r"predicts b \(hf_hook_name_out\)": {"hf_hook_name": "a", "hf_hook_name_out": "b"},
}


@pytest.mark.parametrize("message", DISAGREE)
@pytest.mark.parametrize("in_metadata", [True, False])
def test_a_layer_against_a_hook_is_refused(tmp_path, message, in_metadata):
    hook: dict[str, Any] = {"hook_name": "blocks.2.hook_resid_post", **DISAGREE[message]}
    if in_metadata and "hook_point_layer" not in hook:
        folder = write(tmp_path, "standard", metadata={"sae_lens_version": "6.54.12", **hook})
    else:
        folder = write(tmp_path, "standard", **hook)
    assert message.split("=")[0].split("(")[0].split(" ")[0] in said(folder)
    with pytest.raises(FPOError, match=message):
        load_coder(folder)


def test_a_layer_that_fits_its_hook(tmp_path):
    hook = {"hook_name": "blocks.2.hook_resid_pre", "hook_layer": 2, "hook_layer_out": 2}
    assert load_coder(write(tmp_path, "standard", **hook)).hook == "blocks.2.hook_resid_pre"


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "5", float("nan"), float("inf"), None])
@pytest.mark.parametrize("key", ["k", "d_in", "expansion_factor", "num_latents"])
def test_counts_of_sparsify_that_are_none(tmp_path, key, count):
    if key == "num_latents" and not count:
        return  # not set: the expansion factor counts
    given = {"d_in": D_IN, "expansion_factor": 3, "num_latents": 0, "k": 5, "activation": "topk"}
    state = {
        "encoder.weight": tensor(D_SAE, D_IN),
        "encoder.bias": tensor(D_SAE),
        "W_dec": tensor(D_SAE, D_IN),
        "b_dec": tensor(D_IN),
    }
    save_file(state, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({**given, key: count}))
    assert f"{key} of its configuration is {count!r}, expected a count" in said(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(tmp_path, dtype):
    """Their scales are not in the file; read as they are, every value would be wrong."""
    file = write(tmp_path, "standard") / "sae_weights.safetensors"
    state = load_file(file)
    state["W_enc"] = (40 * state["W_enc"]).to(dtype)
    save_file(state, file)
    with pytest.raises(FPOError, match=rf"W_enc in .* is {dtype}, which is quantized or damaged"):
        load_coder(tmp_path)
