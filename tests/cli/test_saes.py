"""``fpo run`` with SAEs of several sites, and with some that do not belong there."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import activations_at
from fpo_core.sae.coder import load_coder
from storage.catalog import list_artifacts
from storage.location import open_store
from tests.tiny import make_tokenizer, save_recipe, save_sae

MLP = {"hook_name": "blocks.1.hook_mlp_out", "prepend_bos": True}


def run(fpo, recipe, store, *more):
    return fpo("run", recipe, "--store", store, "--report", store.parent / "report", *more)


def test_two_saes_of_one_layer_have_features_of_their_own(fpo, tmp_path):
    """The MLP's, against a plain forward of each response; a prompt begins with BOS here."""
    store, folder = tmp_path / "store", save_sae(tmp_path / "mlp", metadata=MLP)
    also = {"source": str(folder), "layer": 1, "site": "mlp_out"}
    recipe = save_recipe(tmp_path / "r", sae={"also": [also]}, features={"cache_k": "all"})
    for stage in ("tokenize", "reference", "features", "features@1-mlp_out"):
        result = run(fpo, recipe, store, "--only", stage)
        assert result.code == 0, result.err
    opened = open_store(store)
    kinds: dict[str, list] = {}
    for info in list_artifacts(opened):
        kinds.setdefault(info.stage, []).append(opened.artifact(info.stage, info.version))
    assert len(kinds["features"]) == 2
    (found,) = (a for a in kinds["features"] if a.manifest["recipe"]["site"] == "mlp_out")
    pooled = found.scan("pooled").collect()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model").eval()
    coder = load_coder(folder)
    (pairs,) = kinds["pairs"]
    for row in pairs.table(shard=0).to_pylist():
        ids = torch.tensor([[*row["prompt_ids"], *row["chosen_ids"]]])
        x = activations_at(model, Hookpoint(1, "mlp_out"), ids)[0]
        scored = x[len(row["prompt_ids"]) - 1 : -1]
        wanted = coder.encode(scored).double().mean(0).numpy()
        (mine,) = pooled.filter(pair_id=row["pair_id"], side="chosen").to_dicts()
        values = np.zeros(coder.d_sae)
        values[mine["indices"]] = mine["values"]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6)
        assert len(mine["indices"]) > 0


BAD = {
    "a layer that the model does not have": (
        {"layer": 3}, {}, "there is no layer 3, the model has layers 0 to 2",
    ),
    "an SAE of the MLP on the stream": (
        {}, MLP, "declares the hookpoint 'blocks.1.hook_mlp_out'", "its site to mlp_out",
    ),
    "an SAE of attention heads": (
        {}, {"hook_name": "blocks.1.attn.hook_z"}, "'blocks.1.attn.hook_z', the recipe asks for",
    ),
    "an SAE of another branch": (
        {}, {"hook_name": "blocks.1.hook_attn_out"}, "neither a block's output (resid_post) nor",
    ),
    "an unknown key": ({}, None, "what fancy of its cfg.json does to its features is not known"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_sae_that_does_not_belong_there_is_refused_in_words(fpo, tmp_path, case):
    place, metadata, *messages = BAD[case]
    recipe = save_recipe(tmp_path / "r", sae=place)
    more = {"fancy": 1} if metadata is None else {"metadata": metadata}
    save_sae(tmp_path / "r" / "sae", **more)
    result = run(fpo, recipe, tmp_path / "store")
    assert result.code == 1
    assert "Traceback" not in result.err
    for message in messages:
        assert message in " ".join(result.err.split()), result.err


def test_prompts_without_bos_are_refused_for_an_sae_that_had_it(fpo, tmp_path):
    recipe = save_recipe(tmp_path / "r")
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token  # which the template does not begin with
    tokenizer.save_pretrained(tmp_path / "r" / "model")
    assert run(fpo, recipe, tmp_path / "store", "--only", "tokenize").code == 0
    assert run(fpo, recipe, tmp_path / "store", "--only", "reference").code == 0
    save_sae(tmp_path / "r" / "sae", metadata={"prepend_bos": True})
    result = run(fpo, recipe, tmp_path / "store", "--only", "features")
    assert result.code == 1
    assert (
        "declares prepend_bos, but the prompts begin with token 0, not with BOS (1)" in result.err
    )
    assert "data.template=halos" in result.err
