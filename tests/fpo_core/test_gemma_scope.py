"""Gemma Scope's own files: read as sae-lens reads them, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.sae.coder import check_fits, load_coder
from fpo_core.sae.gemma_scope import ARRAYS, declared_hook
from fpo_core.sae.source import declared_width, identify_sae, sae_folder
from tests.tiny import make_model

D_IN, D_SAE = 24, 96
PUBLISHED = "gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55"


def arrays() -> dict[str, np.ndarray]:
    """Weights with what the format allows: negative biases, a b_dec, thresholds of all sizes."""
    random = np.random.default_rng(3)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": D_SAE, "W_dec": (D_SAE, D_IN), "b_dec": D_IN}
    made = {name: random.normal(size=shape) / 3 for name, shape in shapes.items()}
    made["threshold"] = random.uniform(0, 2, D_SAE)
    return {name: array.astype(np.float32) for name, array in made.items()}


def save(folder: Path, **changed: np.ndarray | None) -> Path:
    """Write the file; an array that is given as None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: array for name, array in {**arrays(), **changed}.items() if array is not None}
    np.savez(folder / "params.npz", **found)
    return folder


def sae_lens_sae(file: Path):
    """The SAE that sae-lens makes of a file: as its own loader does, without the hub."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    config = JumpReLUSAEConfig(
        d_in=D_IN, d_sae=D_SAE, dtype="float32", device="cpu", apply_b_dec_to_input=False,
        normalize_activations="none",
    )  # fmt: skip
    sae = JumpReLUSAE(config)
    with np.load(file) as data:
        sae.load_state_dict({name: torch.tensor(data[name]) for name in data})
    return sae


@pytest.mark.parametrize("given", ["", "params.npz"])
def test_encode_and_decode_equal_sae_lens(tmp_path, given):
    place = save(tmp_path / PUBLISHED) / given
    ours, theirs = load_coder(place), sae_lens_sae(tmp_path / PUBLISHED / "params.npz")
    x = 3 * torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        acts = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), acts)
        torch.testing.assert_close(ours.decode(acts), theirs.decode(acts))
    assert 0.05 < float((acts > 0).float().mean()) < 0.95
    assert ours.W_enc.dtype == torch.float32
    assert load_coder(place, decoder=False).W_dec is None
    assert declared_width(str(place)) == D_SAE
    assert sae_folder(str(place)) == place


def test_sae_lens_own_loader_gives_the_same_weights_and_hook(tmp_path, monkeypatch):
    """Its ``gemma_2_sae_huggingface_loader`` on the same file, in the place of the hub's."""
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder = save(tmp_path / PUBLISHED)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(folder / "params.npz"))
    config, state, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", "layer_25/width_16k/average_l0_55"
    )
    ours = load_coder(folder)
    for name in ARRAYS:
        assert torch.equal(getattr(ours, name), state[name])
    assert config["architecture"] == "jumprelu"
    assert config["apply_b_dec_to_input"] is ours.centred is False
    assert config["hook_name"] == ours.hook


HOOKS = {
    PUBLISHED: "blocks.25.hook_resid_post",
    "gemma-scope-9b-pt-mlp/layer_3/width_131k/average_l0_8": "blocks.3.hook_mlp_out",
    "gemma-scope-2b-pt-att-canonical/layer_0/width_16k/canonical": "blocks.0.attn.hook_z",
    "models--google--gemma-scope-9b-it-res/snapshots/1/layer_9/x": "blocks.9.hook_resid_post",
    "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": "hook_embed",
    "sae/layer_7/width_1k/average_l0_20": "blocks.7",
    "gemma-scope-2b-pt-res": "",
    "some/folder": "",
}


@pytest.mark.parametrize("path", HOOKS)
def test_the_path_says_where_it_reads(path):
    assert declared_hook(Path("/saes") / path / "params.npz") == HOOKS[path]


def test_an_sae_of_another_place_is_refused(tmp_path):
    model = make_model("gemma2", num_hidden_layers=26, hidden_size=D_IN)

    def fit(path: str, layer: int) -> None:
        check_fits(load_coder(save(tmp_path / path)), model, Hookpoint(layer), path)

    fit(PUBLISHED, 25)
    fit("sae/layer_7/width_1k", 7)
    fit("anywhere", 7)
    with pytest.raises(FPOError, match=r"'blocks\.25\.hook_resid_post'.*asks for layer 24"):
        fit(PUBLISHED, 24)
    with pytest.raises(FPOError, match=r"declares the hookpoint 'blocks\.7'.*asks for layer 2 "):
        fit("sae/layer_7/width_1k", 2)
    with pytest.raises(FPOError, match=r"hook_mlp_out"):
        fit("gemma-scope-2b-pt-mlp/layer_7/x", 7)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_short_is_named_with_the_remedy(tmp_path, kept):
    file = save(tmp_path) / "params.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    for read in (load_coder, lambda place: sae_folder(str(place))):
        with pytest.raises(FPOError, match=rf"{re.escape(str(file))}: damaged.*Fetch the file"):
            read(tmp_path)


def test_a_flipped_byte_in_the_weights_is_found(tmp_path):
    file = save(tmp_path) / "params.npz"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(FPOError, match=r"params\.npz: damaged"):
        load_coder(tmp_path)


REFUSED = {
    "threshold missing": {"threshold": None},
    r"W_dec has the shape \(24, 96\)": {"W_dec": np.zeros((D_IN, D_SAE), np.float32)},
    r"threshold has the shape \(95,\)": {"threshold": np.zeros(D_SAE - 1, np.float32)},
    "b_enc is of dtype object": {"b_enc": np.array([{}] * D_SAE, dtype=object)},
    "array W_skip does is not supported": {"W_skip": np.zeros(1, np.float32)},
    "scaling_factor other than 1": {"scaling_factor": np.full(D_SAE, 2, np.float32)},
    r"W_enc has the shape \(4,\)": {"W_enc": np.zeros(4, np.float32)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_such_sae_is_refused(tmp_path, message):
    with pytest.raises(FPOError, match=message):
        load_coder(save(tmp_path, **REFUSED[message]))


def test_other_spellings_of_the_same_sae(tmp_path):
    """As sae-lens takes them: small letters, and a factor of ones."""
    made = arrays()
    small = save(
        tmp_path / "small", W_enc=None, W_dec=None, w_enc=made["W_enc"], w_dec=made["W_dec"],
        scaling_factor=np.ones(D_SAE, np.float32),
    )  # fmt: skip
    ours, plain = load_coder(small), load_coder(save(tmp_path / "plain"))
    assert torch.equal(ours.W_enc, plain.W_enc)
    assert ours.W_dec is not None
    assert torch.equal(ours.W_dec, plain.W_dec)


def test_its_identity_is_its_content(tmp_path):
    first, second = save(tmp_path / "a"), save(tmp_path / "b")
    assert identify_sae(str(first)) == identify_sae(str(second / "params.npz"))
    save(second, b_enc=np.zeros(D_SAE, np.float32))
    assert identify_sae(str(first)) != identify_sae(str(second))


def test_the_width_is_read_without_the_weights(tmp_path):
    """The headers stand in front: what follows them may be anything."""
    file = save(tmp_path) / "params.npz"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    assert declared_width(str(tmp_path)) == D_SAE
