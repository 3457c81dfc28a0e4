"""Every family of published SAEs: ours against sae-lens' own loaders and encode.

Files are small and made on the spot; where a loader asks the hub, it finds them instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fpo_core.errors import FPOError
from fpo_core.sae.coder import load_coder
from fpo_core.sae.source import identify_sae, sae_folder
from tests.fpo_core.sae_files import (
    D_IN,
    D_SAE,
    columns_are_exact,
    inputs,
    same_as_sae_lens,
    tensor,
    write,
)  # fmt: skip
from tests.hub_server import Hub, serving

pytestmark = pytest.mark.slow  # importing sae-lens takes seconds


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """A folder that sae-lens' loaders take for every repository of the hub; the cache is empty."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = tmp_path / "hub"

    def download(repo_id="", filename="", subfolder="", **_: Any) -> str:
        return str(folder / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))
    return folder


def fetched(source: str):
    """Our coder of a release, and sae-lens' SAE of it; its identity is known from then on."""
    from sae_lens import SAE

    assert not identify_sae(source).resolved
    ours = load_coder(sae_folder(source))
    assert identify_sae(source).resolved
    return ours, SAE.from_pretrained(*source.split(":"))


def save(file: Path, state: dict[str, torch.Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, file)


LINEAR = {
    "encoder.weight": tensor(D_SAE, D_IN), "encoder.bias": tensor(D_SAE, seed=2),
    "decoder.weight": tensor(D_IN, D_SAE, seed=3), "decoder.bias": tensor(D_IN, seed=4),
}  # fmt: skip


@pytest.mark.parametrize(("release", "hook"), [
    ("llama_scope_lxr_8x:l5r_8x", "blocks.5.hook_resid_post"),
    ("llama_scope_lxm_8x:l5m_8x", "blocks.5.hook_mlp_out"),
])  # fmt: skip
def test_llama_scope(on_the_hub, release, hook):
    """sae-lens' directory has its scaling factor, which is folded into the weights."""
    name = f"Llama3_1-8B-Base-L5{'R' if 'lxr' in release else 'M'}-8x"
    save(on_the_hub / name / "checkpoints" / "final.safetensors", LINEAR)
    settings = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": hook, "jump_relu_threshold": 0.2,
                "dataset_average_activation_norm": {"in": 3.0}}  # fmt: skip
    (on_the_hub / name / "hyperparams.json").write_text(json.dumps(settings))
    ours, theirs = fetched(release)
    assert (ours.hook, ours.prepend_bos, ours.centred) == (hook, True, False)
    same_as_sae_lens(ours, theirs, inputs() / 20)
    assert ours.W_dec is not None
    assert not torch.allclose(ours.W_dec, LINEAR["decoder.weight"].T)


def test_llama_scope_of_the_distilled_model(on_the_hub):
    folder = on_the_hub / "800M-Slimpajama-0-OpenR1-Math-220k" / "L3R"
    state = {**LINEAR, "log_jumprelu_threshold": tensor(D_SAE, seed=5)}
    save(folder / "sae_weights.safetensors", state)
    settings = {"d_model": D_IN, "expansion_factor": D_SAE // D_IN,
                "hook_point_in": "blocks.3.hook_resid_post"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    ours, theirs = fetched("llama_scope_r1_distill:l3r_800m_slimpajama")
    same_as_sae_lens(ours, theirs, inputs() / 20)


def test_a_scaling_factor_that_is_nowhere_is_refused(tmp_path):
    """sae-lens warns and goes on as if there were none."""
    folder = write(tmp_path, "standard", normalize_activations="expected_average_only_in")
    with pytest.raises(
        FPOError, match=r"'expected_average_only_in' is not supported: its scaling "
    ):
        load_coder(folder)


DICTIONARY_LEARNING = {
    "BatchTopKSAE": ({"encoder.weight": "W", "encoder.bias": "b", "decoder.weight": "D",
                      "b_dec": "d", "threshold": "t", "k": "k"}, "jumprelu"),
    "AutoEncoderTopK": ({"encoder.weight": "W", "encoder.bias": "b", "decoder.weight": "D",
                         "b_dec": "d", "threshold": "t", "k": "k"}, "topk"),
    "GatedAutoEncoder": ({"encoder.weight": "W", "decoder.weight": "D", "decoder_bias": "d",
                          "mag_bias": "b", "gate_bias": "g", "r_mag": "T"}, "gated"),
    "JumpReluAutoEncoder": ({"W_enc": "E", "b_enc": "b", "W_dec": "F", "b_dec": "d",
                             "threshold": "T"}, "jumprelu"),
    "AutoEncoder": ({"encoder.weight": "W", "encoder.bias": "b", "decoder.weight": "D",
                     "bias": "d"}, "standard"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_dictionary_learning(on_the_hub, kind):
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    directory = get_pretrained_saes_directory()
    release = next(r for r, e in directory.items() if e.conversion_func == "dictionary_learning_1")
    sae_id, path = next(iter(directory[release].saes_map.items()))
    values = {
        "W": tensor(D_SAE, D_IN), "D": tensor(D_IN, D_SAE, seed=1), "E": tensor(D_IN, D_SAE),
        "F": tensor(D_SAE, D_IN, seed=1), "b": tensor(D_SAE, seed=2), "d": tensor(D_IN, seed=3),
        "g": tensor(D_SAE, seed=6),
        "t": torch.tensor(0.4), "T": tensor(D_SAE, seed=4).abs(), "k": torch.tensor(5),
    }  # fmt: skip
    names, architecture = DICTIONARY_LEARNING[kind]
    folder = on_the_hub / path
    folder.mkdir(parents=True)
    torch.save({name: values[which] for name, which in names.items()}, folder / "ae.pt")
    trainer = {"dict_class": kind, "layer": 8, "k": 5, "activation_dim": D_IN, "dict_size": D_SAE,
               "lm_name": "google/gemma-2-2b"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 9}}))
    ours, theirs = fetched(f"{release}:{sae_id}")
    assert theirs.cfg.architecture() == architecture
    assert ours.hook == "blocks.8.hook_resid_post"
    same_as_sae_lens(ours, theirs, inputs())


def test_gemma_scope_2(on_the_hub, tmp_path, monkeypatch):
    """The published files by themselves, and the same through sae-lens."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    state = {"w_enc": tensor(D_IN, D_SAE), "w_dec": tensor(D_SAE, D_IN, seed=1),
             "b_enc": tensor(D_SAE, seed=2), "b_dec": tensor(D_IN, seed=3),
             "threshold": tensor(D_SAE, seed=4).abs()}  # fmt: skip
    shapes = {name: list(value.shape) for name, value in state.items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    folder = on_the_hub / "mlp_out" / "layer_13_width_16k_l0_medium"
    save(folder / "params.safetensors", state)
    said = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt",
            "hf_hook_point_in": "model.layers.13.post_feedforward_layernorm.output"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(said))
    config, weights, _ = loaders.gemma_3_sae_huggingface_loader(
        "google/gemma-scope-2-1b-pt", "mlp_out/layer_13_width_16k_l0_medium"
    )
    theirs = SAE.from_dict(loaders.handle_config_defaulting(config))
    theirs.load_state_dict(weights)
    theirs.save_model(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        ours = load_coder(place)
        same_as_sae_lens(ours, theirs, inputs())
        assert (ours.hook, ours.hf_hook) == ("blocks.13.hook_mlp_out", said["hf_hook_point_in"])
        assert ours.prepend_bos


def test_gemma_scope_through_sae_lens(on_the_hub, tmp_path):
    """Saved by sae-lens after its own loader."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    path = "layer_2/width_16k/average_l0_9"
    state = {"W_enc": tensor(D_IN, D_SAE), "W_dec": tensor(D_SAE, D_IN, seed=1),
             "b_enc": tensor(D_SAE, seed=2), "b_dec": tensor(D_IN, seed=3),
             "threshold": tensor(D_SAE, seed=4).abs()}  # fmt: skip
    (on_the_hub / path).mkdir(parents=True)
    np.savez(on_the_hub / path / "params.npz", **{k: v.numpy() for k, v in state.items()})  # pyright: ignore[reportArgumentType]
    overrides = {"d_in": D_IN, "d_sae": D_SAE}
    config, weights, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-mlp", path, cfg_overrides=overrides
    )
    config = loaders.handle_config_defaulting(config)
    theirs = JumpReLUSAE(JumpReLUSAEConfig.from_dict(config))
    theirs.load_state_dict(weights)
    theirs.save_model(tmp_path / "saved")
    ours = load_coder(tmp_path / "saved")
    same_as_sae_lens(ours, theirs, inputs())
    same_as_sae_lens(load_coder(on_the_hub / path), theirs, inputs())
    assert (ours.hook, ours.prepend_bos) == ("blocks.2.hook_mlp_out", True)


def test_sparsify_is_sae_lens_but_for_two_things_that_its_loader_does_otherwise(tmp_path):
    """It transposes W_dec, and leaves b_dec in the input after ``normalize_decoder``."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    folder = tmp_path / "layers.10"
    state = {name: LINEAR[name] for name in ("encoder.weight", "encoder.bias")}
    state |= {"W_dec": LINEAR["decoder.weight"].T, "b_dec": LINEAR["decoder.bias"]}
    save(folder / "sae.safetensors", state)
    said = {"d_in": D_IN, "num_latents": D_SAE, "k": 6, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(said))

    def converter(path, device, cfg_overrides):
        overrides = {**(cfg_overrides or {}), "apply_b_dec_to_input": True}
        config, weights = sparsify_disk_loader(path, device, overrides)
        weights["W_dec"] = weights["W_dec"].T
        return config, weights

    theirs = SAE.load_from_disk(folder, dtype="float32", converter=converter)
    ours = load_coder(folder)
    same_as_sae_lens(ours, theirs, inputs())
    columns_are_exact(ours, inputs())


FETCH = """
import sys
from fpo_core.sae.coder import load_coder
from fpo_core.sae.source import sae_folder
for source in sys.argv[1:]:
    coder = load_coder(sae_folder(source))
    print(coder.hook, coder.k, float(coder.W_enc.sum()))
"""


def test_repositories_that_sae_lens_has_no_entry_for(tmp_path):
    """OWNER/NAME:FOLDER of a hub, in sparsify's format and in sae-lens', in another process."""
    made = write(tmp_path / "made", "topk", metadata={"hook_name": "blocks.1.hook_resid_post",
                 "sae_lens_version": "6.54.12"})  # fmt: skip
    save(made / "sae.safetensors", LINEAR)
    said = {"d_in": D_IN, "num_latents": D_SAE, "k": 6}
    hub = Hub()
    hub.commit("owner/sparse", {
        "layers.3.mlp/cfg.json": json.dumps(said).encode(),
        "layers.3.mlp/sae.safetensors": (made / "sae.safetensors").read_bytes(),
    })  # fmt: skip
    hub.commit("owner/lens", {
        f"one/{file.name}": file.read_bytes() for file in made.iterdir() if "sae." not in file.name
    })  # fmt: skip
    with serving(hub) as address:
        places = {"HF_HOME": str(tmp_path / "hf"), "FPO_CACHE": str(tmp_path / "cache")}
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", **places}
        done = subprocess.run(
            [sys.executable, "-c", FETCH, "owner/sparse:layers.3.mlp", "owner/lens:one"],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sparse, lens = (line.split() for line in done.stdout.splitlines())
    assert sparse[:2] == ["layers.3.mlp", "6"]
    assert float(sparse[2]) == pytest.approx(float(LINEAR["encoder.weight"].sum()), rel=1e-5)
    assert lens[:2] == ["blocks.1.hook_resid_post", "7"]


def test_a_release_that_cannot_be_fetched_says_where_its_files_may_be_put(tmp_path, monkeypatch):
    """No hub: tests run offline."""
    monkeypatch.setenv("FPO_CACHE", str(tmp_path))
    source = "gemma-scope-2b-pt-res:layer_25/width_16k/average_l0_55"
    with pytest.raises(FPOError) as refused:
        sae_folder(source)
    place = tmp_path / "saes" / "gemma-scope-2b-pt-res--layer_25__width_16k__average_l0_55"
    assert f"cfg.json and sae_weights.safetensors into {place}" in str(refused.value)
    assert 'from_pretrained("gemma-scope-2b-pt-res", "layer_25/' in str(refused.value)
    assert list(tmp_path.glob("saes/*")) == list(tmp_path.glob("saes/.*")) == []
    write(place, "jumprelu")
    assert load_coder(sae_folder(source)).d_sae == D_SAE
