"""sae-lens' disk format, of all its versions: ours against sae-lens' own encode and decode."""

import importlib
import json

import pytest
import torch

from fpo_core.errors import FPOError
from fpo_core.sae.coder import load_coder
from fpo_core.sae.config import ARCHITECTURES, NORMALIZATIONS, parse_config
from tests.fpo_core.sae_files import (
    D_IN,
    D_SAE,
    columns_are_exact,
    inputs,
    same_as_sae_lens,
    write,
)  # fmt: skip

pytestmark = pytest.mark.slow  # importing sae-lens takes seconds


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_disk_format(tmp_path, architecture, normalization, centred):
    from sae_lens import SAE

    folder = write(tmp_path, architecture, normalize_activations=normalization,
                   apply_b_dec_to_input=centred)  # fmt: skip
    ours = load_coder(folder)
    same_as_sae_lens(ours, SAE.load_from_disk(folder), inputs())
    columns_are_exact(ours, inputs())


def test_decoder_norms_of_a_topk_are_folded_in(tmp_path):
    from sae_lens import SAE

    folder = write(tmp_path / "rescaled", "topk", rescale_acts_by_decoder_norm=True)
    ours = load_coder(folder)
    same_as_sae_lens(ours, SAE.load_from_disk(folder), inputs())
    columns_are_exact(ours, inputs())
    plain = load_coder(write(tmp_path / "plain", "topk"))
    x = inputs()
    assert not torch.equal(ours.encode(x) > 0, plain.encode(x) > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_into_float32(tmp_path, dtype):
    from sae_lens import SAE

    folder = write(tmp_path, "jumprelu", dtype, dtype=str(dtype).removeprefix("torch."))
    ours = load_coder(folder)
    assert ours.encode(inputs().to(dtype)).dtype == torch.float32
    same_as_sae_lens(ours, SAE.load_from_disk(folder, dtype="float32"), inputs())


BEFORE_VERSION_6 = {
    "topk as an activation function": (
        "topk", {"architecture": "standard", "activation_fn_str": "topk",
                 "activation_fn_kwargs": {"k": 5}},
    ),
    "defaults that are not written": ("standard", {"architecture": None}),
    "normalization as a flag": ("standard", {"normalize_activations": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_VERSION_6)
def test_configurations_before_version_6(tmp_path, case):
    from sae_lens import SAE

    architecture, changed = BEFORE_VERSION_6[case]
    folder = write(tmp_path, architecture, prepend_bos=True, hook_point="blocks.4.hook_resid_pre",
                   hook_point_layer=4, l1_coefficient=0.1, lr=1e-4, **changed)  # fmt: skip
    config = json.loads((folder / "cfg.json").read_text())
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in kept.items() if k != "metadata"}))
    ours, theirs = load_coder(folder), SAE.load_from_disk(folder)
    same_as_sae_lens(ours, theirs, inputs())
    assert (ours.hook, ours.prepend_bos) == (theirs.cfg.metadata.hook_name, True)
    assert ours.k == getattr(theirs.cfg, "k", None)


@pytest.mark.parametrize("version", [None, "5.10.3", "6.0.0rc1", "6.54.12"])
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_what_is_declared_of_bos_by_each_version(version, prepend_bos):
    from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

    said = {"sae_lens_version": version, "prepend_bos": prepend_bos}
    said = {key: value for key, value in said.items() if value is not None}
    given = {"architecture": "standard", "d_in": 4, "d_sae": 8}
    given = {**given, "metadata": said} if (version or "").startswith("6") else {**given, **said}
    theirs = handle_config_defaulting(dict(given))["metadata"].get("prepend_bos", False)
    assert parse_config(given, "x").prepend_bos == theirs


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_trained_batch_topk_saved_for_inference(tmp_path, architecture):
    """Saved as a JumpReLU, as sae-lens says."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_training_class

    training, config = get_sae_training_class(architecture)
    widths = {"matryoshka_widths": [16, D_SAE]} if "matryoshka" in architecture else {}
    sae = training(config(d_in=D_IN, d_sae=D_SAE, k=6, **widths))
    with torch.no_grad():
        sae.W_dec.mul_(1 + torch.rand(D_SAE, 1))
        sae.topk_threshold.fill_(0.01)
    sae.save_inference_model(tmp_path)
    same_as_sae_lens(load_coder(tmp_path), SAE.load_from_disk(tmp_path), inputs())


def test_every_architecture_of_sae_lens_is_read_or_refused_with_a_reason():
    importlib.import_module("sae_lens")  # registers them
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    for architecture in {**SAE_CLASS_REGISTRY, **SAE_TRAINING_CLASS_REGISTRY}:
        given = {"architecture": architecture, "d_in": 4, "d_sae": 8, "k": 2}
        if architecture in ARCHITECTURES:
            assert parse_config(given, "x").architecture == architecture
        else:
            with pytest.raises(
                FPOError, match=rf"'{architecture}' is not supported \(.*; supported"
            ):
                parse_config(given, "x")


def test_every_key_that_sae_lens_writes_is_known(tmp_path):
    """The configuration of each architecture, as sae-lens itself saves it."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    for architecture in ARCHITECTURES:
        config = SAE_CLASS_REGISTRY[architecture][1](d_in=D_IN, d_sae=D_SAE).to_dict()
        assert parse_config(json.loads(json.dumps(config)), "x").architecture == architecture
