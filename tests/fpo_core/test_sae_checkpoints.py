"""Training checkpoints of sae-lens, factors next to them, and folders of dictionary_learning.

Each SAE that loads encodes as sae-lens' own.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpo_core.errors import FPOError
from fpo_core.sae.coder import load_coder
from fpo_core.sae.config import parse_config
from fpo_core.sae.source import declared_width, identify_sae
from tests.fpo_core.sae_files import (
    D_IN,
    D_SAE,
    columns_are_exact,
    inputs,
    same_as_sae_lens,
    tensor,
    write,
)

pytestmark = pytest.mark.slow  # importing sae-lens takes seconds

CHECKPOINTS = {"standard": {}, "gated": {}, "jumprelu": {}, "topk": {"k": 6}}


@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_a_training_checkpoint_is_read(tmp_path, architecture):
    importlib.import_module("sae_lens")
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class

    training, config = get_sae_training_class(architecture)
    sae = training(config(d_in=D_IN, d_sae=D_SAE, **CHECKPOINTS[architecture]))
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    with torch.no_grad():
        sae.W_dec.mul_(1 + torch.rand(D_SAE, 1))
        sae.b_dec.normal_()
    sae.save_model(tmp_path)
    ours = load_coder(tmp_path)
    assert ours.hook == "blocks.2.hook_resid_post"
    same_as_sae_lens(ours, SAE.load_from_disk(tmp_path), inputs())
    columns_are_exact(ours, inputs())


def test_every_key_of_sae_lens_training_is_known():
    """The settings of training and of what runs it do nothing to encoding."""
    from sae_lens import config as runner
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    own = [SAE_TRAINING_CLASS_REGISTRY[architecture][1] for architecture in CHECKPOINTS]
    around = [runner.LanguageModelSAERunnerConfig, runner.LoggingConfig, runner.SAETrainerConfig]
    for settings in (*own, *around):
        keys = {field.name for field in dataclasses.fields(settings)} - {"sae"}
        plain = {"architecture": "standard", "d_in": 4, "d_sae": 8}
        idle = dict.fromkeys(sorted(keys - plain.keys()))
        assert parse_config({**idle, **plain}, "x").architecture == "standard"


def scaled(folder: Path, scaler: Any, kind: str = "standard", /, **config: Any) -> Path:
    """Write an SAE with a scaler's file next to it."""
    write(folder, kind, **{"normalize_activations": "expected_average_only_in", **config})
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    return folder


@pytest.mark.parametrize("architecture", [*CHECKPOINTS, "rescaled topk"])
def test_the_factor_next_to_a_checkpoint_is_folded_in(tmp_path, architecture):
    """As sae-lens' trainer does at its end: ``encode`` reads the model's own activations."""
    from sae_lens import SAE

    more = {"rescale_acts_by_decoder_norm": True} if "rescaled" in architecture else {}
    factor = {"scaling_factor": 2.5, "has_whitening": False}
    folder = scaled(tmp_path, factor, architecture.removeprefix("rescaled "), **more)
    theirs = SAE.load_from_disk(folder)
    theirs.fold_activation_norm_scaling_factor(2.5)
    ours = load_coder(folder)
    same_as_sae_lens(ours, theirs, inputs())
    columns_are_exact(ours, inputs())
    plain = load_coder(write(tmp_path / "plain", architecture.removeprefix("rescaled "), **more))
    assert not torch.allclose(ours.encode(inputs()), plain.encode(inputs()))
    encoder = load_coder(folder, decoder=False)
    assert encoder.W_dec is None
    torch.testing.assert_close(encoder.encode(inputs()), ours.encode(inputs()))


def test_the_factor_is_part_of_the_identity(tmp_path):
    folder = scaled(tmp_path, {"scaling_factor": 2.5})
    before = identify_sae(str(folder))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 3.5}))
    assert identify_sae(str(folder)) != before


def test_a_scaler_of_finished_training_has_no_factor(tmp_path):
    folder = scaled(tmp_path, {"scaling_factor": None}, normalize_activations="none")
    plain = load_coder(write(tmp_path / "plain", "standard"))
    torch.testing.assert_close(load_coder(folder).encode(inputs()), plain.encode(inputs()))


SCALERS = {
    "scaling_factor is 'x', expected a positive number": ({"scaling_factor": "x"}, {}),
    "scaling_factor is -1, expected": ({"scaling_factor": -1}, {}),
    "scaling_factor is nan, expected": ({"scaling_factor": float("nan")}, {}),
    "has_whitening=true is not supported": ({"scaling_factor": 2, "has_whitening": True}, {}),
    "not an object of settings": ([2.5], {}),
    "its scaling factor is not in the file": ({"scaling_factor": None}, {}),
    "says normalize_activations='none'": ({"scaling_factor": 2}, {"normalize_activations": None}),
    "says normalize_activations='layer_norm'": (
        {"scaling_factor": 2},
        {"normalize_activations": "layer_norm"},
    ),
}


@pytest.mark.parametrize("message", SCALERS)
def test_a_scaler_that_cannot_be_honoured_is_refused(tmp_path, message):
    scaler, config = SCALERS[message]
    folder = scaled(tmp_path, scaler, **config)
    for read in (load_coder, lambda folder: declared_width(str(folder))):
        with pytest.raises(FPOError, match=message):
            read(folder)


LINEAR = {"encoder.weight": tensor(D_SAE, D_IN), "decoder.weight": tensor(D_IN, D_SAE, seed=3)}
BIASES = {"encoder.bias": tensor(D_SAE, seed=2), "b_dec": tensor(D_IN, seed=4)}
PLAIN = {
    "W_enc": tensor(D_IN, D_SAE),
    "b_enc": tensor(D_SAE, seed=2),
    "W_dec": tensor(D_SAE, D_IN, seed=3),
    "b_dec": tensor(D_IN, seed=4),
}
BATCH = {"threshold": torch.tensor(0.2), "k": torch.tensor(7)}
DICTIONARIES = {
    "AutoEncoder": {**LINEAR, "encoder.bias": tensor(D_SAE, seed=2), "bias": tensor(D_IN, seed=4)},
    "AutoEncoderTopK": {**LINEAR, **BIASES, **BATCH},
    "BatchTopKSAE": {**LINEAR, **BIASES, **BATCH},
    "MatryoshkaBatchTopKSAE": {**PLAIN, **BATCH, "group_sizes": torch.tensor([16, 32])},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": tensor(D_SAE, seed=6).abs()},
    "GatedAutoEncoder": {
        **LINEAR,
        "decoder_bias": tensor(D_IN, seed=4),
        "mag_bias": tensor(D_SAE, seed=2),
        "gate_bias": tensor(D_SAE, seed=5),
        "r_mag": tensor(D_SAE, seed=6),
    },
}
TRAINER = {"activation_dim": D_IN, "dict_size": D_SAE, "k": 7, "layer": 2, "lm_name": "org/model"}


def dictionary(folder: Path, kind: str, buffer: Any = None, **trainer: Any) -> Path:
    """Write a folder as dictionary_learning's ``trainSAE`` does."""
    folder.mkdir(parents=True)
    torch.save(DICTIONARIES.get(kind, {}), folder / "ae.pt")
    given = {"dict_class": kind, **TRAINER, **trainer}
    settings = {key: value for key, value in given.items() if value is not None}
    buffer = {"ctx_len": 128, **(buffer or {})}
    (folder / "config.json").write_text(json.dumps({"trainer": settings, "buffer": buffer}))
    return folder


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_a_local_folder_of_dictionary_learning(tmp_path, monkeypatch, kind):
    """sae-lens has a loader of such folders on the hub; its files are found here instead."""
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = dictionary(tmp_path / "trainer_0", kind)
    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda filename, **_: str(tmp_path / filename)
    )  # no network: the loader itself runs

    def read(path, device, cfg_overrides=None):
        found = loaders.dictionary_learning_sae_huggingface_loader_1("any", path, device)
        return found[:2]

    theirs = SAE.load_from_disk("trainer_0", converter=read)
    ours = load_coder(folder)
    same_as_sae_lens(ours, theirs, inputs())
    columns_are_exact(ours, inputs())
    assert (ours.hook, ours.prepend_bos) == ("blocks.2.hook_resid_post", True)
    assert declared_width(str(folder)) == D_SAE
    assert identify_sae(str(folder)).resolved


def test_a_dictionary_whose_configuration_has_no_widths(tmp_path):
    folder = dictionary(tmp_path / "a", "AutoEncoder", activation_dim=None, dict_size=None)
    assert declared_width(str(folder)) == D_SAE
    assert load_coder(folder).d_in == D_IN


def test_a_dictionary_says_where_it_reads(tmp_path):
    said = {
        "resid_post_layer_8": "blocks.8.hook_resid_post",
        "mlp_out_layer_8": "blocks.8.hook_mlp_out",
        "attn_out_layer8": "blocks.8.hook_attn_out",
    }
    for submodule, hook in said.items():
        folder = dictionary(tmp_path / submodule, "AutoEncoder", layer=8, submodule_name=submodule)
        assert load_coder(folder).hook == hook
    buffer = {"add_special_tokens": False}
    assert not load_coder(dictionary(tmp_path / "no", "AutoEncoder", buffer)).prepend_bos


REFUSED = {
    "dict_class='CrossCoder' in its config.json is not supported": {"dict_class": "CrossCoder"},
    "submodule_name='novel_layer_2' in its config.json is not known": {
        "submodule_name": "novel_layer_2"
    },
    "submodule_name='mlp_out_layer_3' and layer=2 .* disagree": {
        "submodule_name": "mlp_out_layer_3"
    },
    "io='in' in its config.json is not supported": {"buffer": {"io": "in"}},
    "dict_size of its configuration is -1": {"dict_size": -1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_dictionary_declares_and_is_not_supported(tmp_path, message):
    changed: dict[str, Any] = dict(REFUSED[message])
    kind = changed.pop("dict_class", "AutoEncoder")
    with pytest.raises(FPOError, match=message):
        load_coder(dictionary(tmp_path / "a", kind, **changed))


def test_an_ae_pt_that_would_run_code_is_not_loaded(tmp_path):
    """A pickle may name any function: here one that would write a file."""
    folder = dictionary(tmp_path / "a", "AutoEncoder")

    class Runs:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "x"))

    torch.save({"encoder.weight": Runs()}, folder / "ae.pt")
    with pytest.raises(FPOError, match="holds more than tensors, which is not loaded"):
        load_coder(folder)
    assert not (tmp_path / "ran").exists()
    torch.save([torch.zeros(2)], folder / "ae.pt")
    with pytest.raises(FPOError, match="not tensors by name"):
        load_coder(folder)
    for content in (b"", b"PK\x03\x04 cut"):
        (folder / "ae.pt").write_bytes(content)
        with pytest.raises(FPOError, match="damaged"):
            load_coder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FPOError, match=r"it has ae\.pt without config\.json"):
        load_coder(folder)


def test_a_threshold_of_infinity_turns_a_feature_off(tmp_path):
    """Half precision makes it of 1e9; sae-lens encodes with it."""
    from sae_lens import SAE

    file = write(tmp_path, "jumprelu") / "sae_weights.safetensors"
    state = load_file(file)
    state["threshold"][:5] = float("inf")
    state["threshold"][5] = float("-inf")
    save_file(state, file)
    ours = load_coder(tmp_path)
    same_as_sae_lens(ours, SAE.load_from_disk(tmp_path), inputs())
    assert not ours.encode(inputs())[:, :5].any()
    state["threshold"][0] = float("nan")
    save_file(state, file)
    with pytest.raises(FPOError, match="threshold in sae_weights.safetensors is damaged"):
        load_coder(tmp_path)
