"""What SAEs declare of themselves: their hooks, their configurations, and what is refused."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.architectures import ARCHITECTURES
from fpo_core.models.hooks import activations_at
from fpo_core.sae import source
from fpo_core.sae.coder import check_bos, check_fits, load_coder
from fpo_core.sae.config import parse_config
from fpo_core.sae.declared import declared_place
from fpo_core.sae.source import declared_width, identify_sae, sae_folder
from tests.fpo_core.test_architectures import HIDDEN as WIDTH
from tests.fpo_core.test_architectures import IDS, LAYERS, make
from tests.tiny import D_SAE, HIDDEN, save_sae

# Name, architecture -> layer and site; None: no site here.
PLACES = {
    ("blocks.5.hook_resid_post", "llama"): (5, "resid_post"),
    ("blocks.5.hook_resid_pre", "gpt2"): (4, "resid_post"),
    ("blocks.0.hook_resid_pre", "gpt2"): None,
    ("blocks.5.hook_mlp_out", "gemma2"): (5, "mlp_out"),
    ("blocks.7", "gemma2"): (7, None),
    ("blocks.5.attn.hook_z", "gemma2"): None,
    ("blocks.5.hook_attn_out", "llama"): None,
    ("blocks.5.ln2.hook_normalized", "gemma2"): None,
    ("hook_embed", "gemma2"): None,
    ("layers.10", "llama"): (10, "resid_post"),
    ("layers.10.mlp", "llama"): (10, "mlp_out"),
    ("layers.10.mlp", "gemma2"): None,  # before the norm that follows it
    ("layers.10.post_feedforward_layernorm", "gemma2"): (10, "mlp_out"),
    ("layers.10.self_attn", "llama"): None,
    ("model.layers.3", "qwen3"): (3, "resid_post"),
    ("model.layers.3.output", "gemma3_text"): (3, "resid_post"),
    ("model.language_model.layers.3.output", "gemma3_text"): (3, "resid_post"),
    ("model.layers.3.post_feedforward_layernorm.output", "gemma3_text"): (3, "mlp_out"),
    ("model.layers.3.self_attn.o_proj.input", "gemma3_text"): None,
    ("model.layers.3.input", "gemma3_text"): None,
    ("model.layers.3.mlp.input", "llama"): None,
    ("transformer.h.3.mlp", "gpt2"): (3, "mlp_out"),
    ("h.3", "gpt2"): (3, "resid_post"),
    ("layers.3", "gpt2"): None,
    ("embed_tokens", "llama"): None,
    ("model.norm", "llama"): None,
}


@pytest.mark.parametrize(("name", "architecture"), PLACES)
def test_names_of_hooks(name, architecture):
    assert declared_place(name, ARCHITECTURES[architecture]) == PLACES[name, architecture]


def save(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    """Write a folder of sparsify's."""
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in state.items()},
              folder / "sae.safetensors")  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STATE = {"encoder.weight": random(D_SAE, HIDDEN), "encoder.bias": random(D_SAE, seed=1),
         "W_dec": random(D_SAE, HIDDEN, seed=2), "b_dec": random(HIDDEN, seed=3)}  # fmt: skip
SPARSIFY = {"d_in": HIDDEN, "expansion_factor": D_SAE // HIDDEN, "num_latents": 0, "k": 5,
            "normalize_decoder": True, "multi_topk": False, "activation": "topk",
            "skip_connection": False, "transcode": False}  # fmt: skip


@pytest.mark.parametrize("normalize_decoder", [True, False])
def test_sparsify_by_its_definition(tmp_path, normalize_decoder):
    """In float64: the k largest of relu(W (x - b_dec) + b), times the decoder's rows."""
    config = {**SPARSIFY, "normalize_decoder": normalize_decoder}
    folder = save(tmp_path / "layers.10.mlp", STATE, config)
    coder, x = load_coder(folder), random(100, HIDDEN, seed=5)
    weight, bias, rows, offset = (value.double() for value in STATE.values())
    pre_acts = ((x.double() - offset) @ weight.T + bias).clamp_min(0.0)
    kept = pre_acts >= pre_acts.topk(5, dim=1).values[:, -1:]
    torch.testing.assert_close(coder.encode(x).double(), pre_acts * kept, rtol=1e-5, atol=1e-5)
    wanted = (pre_acts * kept) @ rows + offset
    torch.testing.assert_close(coder.decode(coder.encode(x)).double(), wanted, rtol=1e-5, atol=1e-4)
    assert (coder.hook, coder.prepend_bos) == ("layers.10.mlp", False)
    assert sae_folder(str(folder)) == folder
    assert declared_width(str(folder)) == D_SAE
    before = identify_sae(str(folder))
    (folder / "cfg.json").write_text(json.dumps({**config, "k": 6}))
    assert identify_sae(str(folder)) != before


def test_a_folder_with_another_name_declares_no_place(tmp_path):
    assert load_coder(save(tmp_path / "mine", STATE, SPARSIFY)).hook == ""
    assert load_coder(save(tmp_path / "OWNER__NAME--layers.3", STATE, SPARSIFY)).hook == "layers.3"


SPARSIFY_REFUSED = {
    "transcode=true is not supported": {"transcode": True},
    "skip_connection=true": {"skip_connection": True},
    "signed=true": {"signed": True},
    "activation='groupmax'": {"activation": "groupmax"},
    "what fancy of its cfg.json does": {"fancy": 1},
    "k of its configuration is None, expected a count": {"k": None},
}


@pytest.mark.parametrize("message", SPARSIFY_REFUSED)
def test_what_sparsify_has_and_is_not_read(tmp_path, message):
    with pytest.raises(FPOError, match=message):
        sae_folder(str(save(tmp_path / "h.3", STATE, {**SPARSIFY, **SPARSIFY_REFUSED[message]})))


PLAIN = {"architecture": "standard", "d_in": 4, "d_sae": 8}
REFUSED = {
    "architecture 'transcoder' is not supported (it predicts": {"architecture": "transcoder"},
    "architecture 'novel' is not supported; supported: standard": {"architecture": "novel"},
    "architecture 'batchtopk' is not supported (it is a training": {"architecture": "batchtopk"},
    "activation_fn='tanh-relu'": {"activation_fn_str": "tanh-relu"},
    "signed=true": {"activation_fn": "topk", "activation_fn_kwargs": {"k": 3, "signed": True}},
    "k of its configuration is None": {"architecture": "topk"},
    "metadata of its cfg.json is no object": {"metadata": "blocks.3"},
    "pretrained_kwargs of its cfg.json is no object": {
        "metadata": {"model_from_pretrained_kwargs": "x"},
    },
    "d_in of its configuration is '4'": {"d_in": "4"},
    "what temperature of its cfg.json does": {"temperature": 2.0},
    "normalize_activations='expected_average_only_in'": {"normalize_activations": True},
    "normalize_activations='covariance_whitening'": {
        "normalize_activations": "covariance_whitening"
    },
    "reshape_activations='hook_z'": {"metadata": {"hook_name": "blocks.3.attn.hook_z"}},
    "hook_head_index=2": {"hook_head_index": 2},
    "predicts blocks.3.hook_mlp_out": {
        "metadata": {"hook_name": "blocks.3.ln2.hook_normalized",
                     "hook_name_out": "blocks.3.hook_mlp_out"},
    },
    "finetuning_scaling_factor=true": {"finetuning_scaling_factor": True},
    "rescale_acts_by_decoder_norm=true is for topk": {"rescale_acts_by_decoder_norm": True},
    "loaded with peft_adapter": {"metadata": {"model_from_pretrained_kwargs": {"peft_adapter": 1}}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_declared_and_not_honoured_is_refused_by_name(message):
    with pytest.raises(FPOError, match=re.escape(message)):
        parse_config({**PLAIN, **REFUSED[message]}, "x")


@pytest.mark.parametrize("file", ["cfg.json", "sae.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_files_of_sparsify_that_were_cut_short(tmp_path, file, kept):
    path = save(tmp_path / "h.3", STATE, SPARSIFY) / file
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    said = "not JSON" if file == "cfg.json" else "is missing or damaged.*Fetch the file again"
    with pytest.raises(FPOError, match=rf"{re.escape(file)}:? {said}"):
        load_coder(path.parent)


def test_gemma_scope_2_of_which_only_the_path_says_where_it_reads(tmp_path):
    state = {"w_enc": random(HIDDEN, D_SAE), "w_dec": random(D_SAE, HIDDEN), "b_enc": random(D_SAE),
             "b_dec": random(HIDDEN), "threshold": random(D_SAE).abs()}  # fmt: skip
    for place, hook in (
        ("resid_post/layer_9_width_16k_l0_small", "blocks.9.hook_resid_post"),
        ("mlp_out_all/layer_9_width_16k_l0_small", "blocks.9.hook_mlp_out"),
        ("attn_out/layer_9_width_16k_l0_small", "blocks.9.attn.hook_z"),
        ("mine/layer_9", "blocks.9"),
        ("mine/sae", ""),
    ):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        save_file(state, folder / "params.safetensors")
        assert load_coder(folder).hook == hook
        assert declared_width(str(folder)) == D_SAE
    file = folder / "params.safetensors"
    (folder / "config.json").write_text('{"architecture": "jump_relu", "hf_hook_point_in": "a", '
                                        '"hf_hook_point_out": "b"}')  # fmt: skip
    with pytest.raises(FPOError, match=r"a transcoder \(to b\) is not supported"):
        sae_folder(str(folder))
    (folder / "config.json").unlink()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FPOError, match=r"params\.safetensors is missing or damaged"):
        sae_folder(str(folder))


def test_tensors_that_do_not_fit_are_named(tmp_path):
    short = {**STATE, "b_dec": random(HIDDEN - 1)}
    with pytest.raises(FPOError, match=r"b_dec has the shape \(31,\), beside W_enc .* \(32,\)"):
        load_coder(save(tmp_path / "a", short, SPARSIFY))
    with pytest.raises(FPOError, match=r"what W_skip in sae\.safetensors does is not known"):
        load_coder(save(tmp_path / "b", {**STATE, "W_skip": random(2)}, SPARSIFY))


STORED = {  # written by their formats' names for the encoder
    "sae_weights.safetensors": "W_enc",
    "sae.safetensors": "encoder.weight",
    "params.npz": "W_enc",
    "params.safetensors": "w_enc",
}


def save_format(folder: Path, file: str, value: float) -> Path:
    """An SAE in the format that has such a file; one weight of its encoder has that value."""
    if file == "sae_weights.safetensors":
        return edit(save_sae(folder) / file, value)
    if file == "sae.safetensors":
        return edit(save(folder, STATE, SPARSIFY) / file, value)
    weights = load_file(save_sae(folder / "lens") / "sae_weights.safetensors")
    weights["W_enc"][3, 4] = value
    if file == "params.npz":
        np.savez(folder / file, **{name: tensor.numpy() for name, tensor in weights.items()})  # pyright: ignore[reportArgumentType]
    else:
        save_file({name.replace("W_", "w_"): w for name, w in weights.items()}, folder / file)
    return folder


def edit(file: Path, value: float) -> Path:
    state = load_file(file)
    state[STORED[file.name]][3, 4] = value
    save_file(state, file)
    return file.parent


@pytest.mark.parametrize("file", STORED)
@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, file, decoder, value):
    fine = load_coder(save_format(tmp_path / "layers.2", file, 0.5), decoder=decoder)
    assert (fine.W_enc == 0.5).sum() == 1
    folder = save_format(tmp_path / "layers.3", file, value)
    with pytest.raises(FPOError, match=rf"W_enc in {re.escape(file)} is damaged: .*not finite"):
        load_coder(folder, decoder=decoder)


def test_a_k_beyond_the_features_is_refused(tmp_path):
    """Before any weights are read."""
    message = rf"k={D_SAE + 1} of its cfg\.json is more than its {D_SAE} features"
    sparse = save(tmp_path / "h.3", STATE, {**SPARSIFY, "k": D_SAE + 1})
    lens = save_sae(tmp_path / "lens", architecture="topk", k=D_SAE + 1)
    for folder in (sparse, lens):
        for read in (load_coder, lambda folder: declared_width(str(folder))):
            with pytest.raises(FPOError, match=message):
                read(folder)
    assert load_coder(save_sae(tmp_path / "all", architecture="topk", k=D_SAE)).k == D_SAE


@pytest.mark.parametrize(
    "declared",
    [{}, {"architecture": "topk", "k": 5}, {"normalize_activations": "constant_norm_rescale"}],
)
def test_no_tokens_have_no_features(tmp_path, declared):
    coder = load_coder(save_sae(tmp_path, **declared))
    token, feature, value = coder.active(torch.empty(0, HIDDEN))
    assert len(token) == len(feature) == len(value) == 0
    columns = coder.encode_columns(torch.empty(0, HIDDEN), torch.tensor([2, 5]))
    assert columns.shape == (0, 2)


def test_two_processes_may_fetch_the_same_sae(tmp_path, monkeypatch):
    """The second one finds the first one's folder in its place."""
    monkeypatch.setenv("FPO_CACHE", str(tmp_path))
    together = Barrier(2)

    def fetch(_release, _sae_id, folder):
        together.wait(30)
        save_sae(folder)

    monkeypatch.setattr(source, "_fetch", fetch)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(sae_folder, ["release:id"] * 2))
    assert found[0] == found[1]
    assert load_coder(found[0]).d_sae == D_SAE
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["release--id"]


def test_where_the_files_of_a_hub_repository_may_be_put(tmp_path, monkeypatch):
    """One that sae-lens' directory does not have: ``from_pretrained`` would not find it either."""
    monkeypatch.setenv("FPO_CACHE", str(tmp_path))

    def fetch(*_):
        raise OSError("no network")

    monkeypatch.setattr(source, "_fetch", fetch)
    with pytest.raises(FPOError) as refused:
        sae_folder("owner/name:layers.3")
    place = tmp_path / "saes" / "owner__name--layers.3"
    assert "get cfg.json and sae.safetensors (in sae-lens' format sae_w" in str(refused.value)
    assert "of the folder layers.3 of the hub's owner/name" in str(refused.value)
    assert str(refused.value).endswith(f"put them into {place}")
    assert "from_pretrained" not in str(refused.value)
    save(place, STATE, SPARSIFY)
    assert load_coder(sae_folder("owner/name:layers.3")).hook == "layers.3"


@pytest.mark.parametrize(
    ("declared", "prepend_bos"),
    [
        ({}, True),
        ({"prepend_bos": False}, False),
        ({"sae_lens_version": "5.10.3"}, True),
        ({"metadata": {"sae_lens_version": "4.0"}}, True),
        ({"metadata": {"sae_lens_version": "6.0.0-rc.1"}}, False),
        ({"metadata": {"sae_lens_version": "6.54.12"}}, False),
        ({"metadata": {"sae_lens_version": "6.54.12", "prepend_bos": True}}, True),
        ({"metadata": {"sae_lens_version": "10.0.0"}}, False),
    ],
)
def test_before_version_6_bos_is_the_default(declared, prepend_bos):
    """As in sae-lens' ``handle_config_defaulting``; ``test_sae_lens.py`` compares them."""
    assert parse_config({**PLAIN, **declared}, "x").prepend_bos == prepend_bos


def fits(tmp_path: Path, model: Any, hookpoint: Hookpoint, width: int = WIDTH, **declared) -> None:
    folder = save_sae(tmp_path / str(len(list(tmp_path.iterdir()))), width, metadata=declared)
    check_fits(load_coder(folder), model, hookpoint, "mine")


def test_an_sae_fits_where_it_says_that_it_reads(tmp_path):
    gpt2, gemma, wrapped = make("gpt2"), make("gemma2"), make("gemma3-multimodal")
    fits(tmp_path, gpt2, Hookpoint(1), hook_name="blocks.2.hook_resid_pre")
    fits(tmp_path, gpt2, Hookpoint(2, "mlp_out"), hook_name="transformer.h.2.mlp")
    fits(tmp_path, wrapped, Hookpoint(2, "mlp_out"), hook_name="blocks.2.hook_mlp_out",
         hf_hook_name="model.layers.2.post_feedforward_layernorm.output")  # fmt: skip
    fits(tmp_path, gemma, Hookpoint(2, "mlp_out"), hook_name="blocks.2")
    fits(tmp_path, gemma, Hookpoint(2, "final_norm"), hook_name="blocks.0.hook_resid_post")
    fits(tmp_path, gemma, Hookpoint(2))


MISFITS = {
    r"'blocks\.2\.hook_mlp_out', .* layer 2 resid_post; set its layer to 2 and its site to mlp_out":
        (Hookpoint(2), {"hook_name": "blocks.2.hook_mlp_out"}),
    r"'blocks\.2\.hook_resid_pre', .* set its layer to 1 and its site to resid_post":
        (Hookpoint(2), {"hook_name": "blocks.2.hook_resid_pre"}),
    r"'layers\.2\.mlp', .*; in Gemma2ForCausalLM that is neither a block's output":
        (Hookpoint(2, "mlp_out"), {"hook_name": "layers.2.mlp"}),
    r"'model\.layers\.1\.output', the recipe asks for layer 2":
        (Hookpoint(2), {"hook_name": "blocks.2.hook_resid_post",
                        "hf_hook_name": "model.layers.1.output"}),
    r"there is no layer 3, the model has layers 0 to 2":
        (Hookpoint(3), {"hook_name": "blocks.3.hook_resid_post"}),
    r"width 31 \(d_in\), the model's hidden size is 32; choose an SAE":
        (Hookpoint(2, "mlp_out"), {"width": 31}),
    r"center_writing_weights, which there is for models with LayerNorm only":
        (Hookpoint(2), {"model_from_pretrained_kwargs": {"center_writing_weights": True}}),
}  # fmt: skip


@pytest.mark.parametrize("message", MISFITS)
def test_an_sae_that_does_not_fit_says_what_would(tmp_path, message):
    hookpoint, declared = MISFITS[message]
    with pytest.raises(FPOError, match=message):
        fits(tmp_path, make("gemma2"), hookpoint, **declared)


@torch.no_grad()
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_an_sae_of_a_centred_gpt2_reads_the_plain_one(tmp_path, site):
    """TransformerLens takes the mean out of all that writes to the stream: logits stay."""
    model, centred = make("gpt2"), make("gpt2")
    transformer = centred.transformer
    writing = [transformer.wte.weight, transformer.wpe.weight]
    for block in transformer.h:
        for module in (block.attn.c_proj, block.mlp.c_proj):
            writing += [module.weight, module.bias]
    centred.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for weight in writing:
        weight -= weight.mean(-1, keepdim=True)
    torch.testing.assert_close(
        centred(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
    )
    name = f"blocks.{LAYERS - 1}.hook_{site}"
    kwargs = {"center_writing_weights": True, "fold_ln": True}
    folder = save_sae(tmp_path / "centred", WIDTH, metadata={
        "hook_name": name, "model_from_pretrained_kwargs": kwargs})  # fmt: skip
    coder, plain = load_coder(folder), load_coder(save_sae(tmp_path / "plain", WIDTH))
    place = Hookpoint(LAYERS - 1, site)
    check_fits(coder, model, place, "mine")
    x, wanted = (activations_at(m, place, IDS).flatten(0, 1) for m in (model, centred))
    assert x.mean(-1).abs().max() > 0.01
    torch.testing.assert_close(coder.encode(x), plain.encode(wanted), rtol=1e-4, atol=1e-4)
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(
        coder.decode(coder.encode(x), x), plain.decode(plain.encode(wanted)) + mean,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_bos_is_checked_where_it_is_declared(tmp_path):
    declares = load_coder(save_sae(tmp_path / "a", metadata={"prepend_bos": True}))
    silent = load_coder(save_sae(tmp_path / "b"))
    check_bos(declares, [7, 8], 7, "mine")
    check_bos(declares, [8, 7], None, "mine")
    check_bos(silent, [8, 7], 7, "mine")
    with pytest.raises(FPOError, match=r"prepend_bos, but the prompts begin with token 8, not with "
                       r"BOS \(7\).*data\.template=halos"):  # fmt: skip
        check_bos(declares, [8, 7], 7, "mine")
