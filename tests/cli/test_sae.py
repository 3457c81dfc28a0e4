"""``fpo sae check``, and the gate in the ``features`` stage: what runs, what is refused."""

import json

import pytest
import torch
import yaml

from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import activations_at
from fpo_core.models.load import load_model
from storage.catalog import list_artifacts
from storage.location import open_store
from tasks.gate import gate_sae, gate_stats, is_gated
from tasks.run import prepare_run
from tests.conftest import Result
from tests.tiny import SAE_LAYER, fit_sae, save_recipe

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose SAE explains the activations of its pairs."""
    from cli.main import main

    folder = tmp_path_factory.mktemp("fitted")
    path = save_recipe(folder, sae={"gate": "refuse"})
    with pytest.raises(SystemExit):
        main(["sae", "check", str(path), "--store", str(folder / "store")])
    store = open_store(folder / "store")
    (info,) = list_artifacts(store)
    pairs = store.artifact("pairs", info.version).scan().collect().to_dicts()
    model = load_model(folder / "model", dtype="float32", attention="sdpa")
    rows = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs for side in SIDES]
    read = [activations_at(model, Hookpoint(SAE_LAYER), torch.tensor([row]))[0, 1:] for row in rows]
    fit_sae(folder / "sae", torch.cat(read))
    return path


@pytest.fixture
def silent(recipe):
    """The same recipe at another layer, with an SAE that does not say where it belongs."""
    file = recipe.parent / "sae" / "cfg.json"
    said = file.read_text()
    file.write_text(json.dumps({**json.loads(said), "metadata": {}}))
    yield ("--set", "sae.layer=2")
    file.write_text(said)


def check(fpo, recipe, tmp_path, *options) -> tuple[Result, list[dict]]:
    """The command's result, and its records where it prints JSON."""
    result = fpo("sae", "check", recipe, "--store", tmp_path / "store", *options)
    return result, json.loads(result.out) if "--json" in options else []


def test_an_sae_that_fits(fpo, recipe, tmp_path):
    result, _ = check(fpo, recipe, tmp_path)
    assert result.code == 0, result.err
    assert "as `fpo run --only tokenize` does" in result.err
    assert "layer 1 resid_post" in result.out
    assert "fits" in result.out
    again, (found,) = check(fpo, recipe, tmp_path, "--json")
    assert again.code == 0
    assert "tokenize" not in again.err
    assert (found["verdict"], found["name"]) == ("fits", str(recipe.parent / "sae"))
    record = found["record"]
    assert record["fvu"] < 0.4
    assert record["fits"]
    (info,) = list_artifacts(open_store(tmp_path / "store"))
    assert info.stage == "pairs"


def test_tokens_are_as_many_as_asked_for(fpo, recipe, tmp_path):
    counts = [
        check(fpo, recipe, tmp_path, "--json", "--tokens", tokens)[1][0]["record"]["tokens"]
        for tokens in (64, 200)
    ]
    assert 60 <= counts[0] < 140 < counts[1] < 280


def test_a_wrong_layer_is_refused_by_what_it_declares_and_by_its_figures(fpo, recipe, tmp_path):
    result, _ = check(fpo, recipe, tmp_path, "--set", "sae.layer=2")
    assert result.code == 1
    told = " ".join(result.out.split())
    assert "it declares the hookpoint 'blocks.1.hook_resid_post'" in told
    assert "it explains layer 1 resid_post far better" in told
    assert "set sae.layer to 1" in told


def test_by_its_figures_alone(fpo, recipe, silent, tmp_path):
    result, (found,) = check(fpo, recipe, tmp_path, *silent, "--json")
    assert (result.code, found["verdict"]) == (1, "refused")
    assert found["record"]["cause"].startswith("it explains layer 1 resid_post far better")
    assert found["record"]["best_elsewhere"]["place"] == "layer 1 resid_post"
    warned, (found,) = check(fpo, recipe, tmp_path, *silent, "--json", "--set", "sae.gate=warn")
    assert (warned.code, found["verdict"]) == (0, "told")


def test_after_the_final_norm_it_is_told_only(fpo, recipe, tmp_path):
    result, (found,) = check(fpo, recipe, tmp_path, "--set", "sae.site=final_norm", "--json")
    assert (result.code, found["verdict"]) == (0, "told")
    assert "set sae.site to resid_post" in found["record"]["cause"]


def test_what_cannot_be_measured_is_an_error(fpo, recipe, tmp_path):
    beyond, _ = check(fpo, recipe, tmp_path, "--set", "sae.layer=7")
    assert (beyond.code, beyond.out) == (1, "")
    assert "there is no layer 7, the model has layers 0 to 2" in beyond.err
    train = "{text: [{path: %s, kind: text}], d_sae: 64, k: 4, steps: 2, lr: 1e-3}"
    text = train % (recipe.parent / "train.jsonl")
    untrained, _ = check(
        fpo, recipe, tmp_path, "--set", "sae.source=null", "--set", f"sae.train={text}"
    )
    assert untrained.code == 1
    assert "is not trained yet: run `fpo run --only sae` first" in untrained.err


def test_the_features_stage_stops_before_it_reads(fpo, recipe, silent, tmp_path):
    store = tmp_path / "store"
    only = ("run", recipe, "--store", store, *silent, "--only")
    assert fpo(*only, "tokenize").code == 0
    refused = fpo(*only, "features")
    assert refused.code == 1
    assert "is not in its place: it explains layer 1 resid_post far better" in refused.err
    assert "SAE at layer 2 resid_post: FVU " in refused.err
    assert "To use it as it is: sae.gate=warn" in refused.err
    assert {info.stage for info in list_artifacts(open_store(store))} == {"pairs"}
    warned = fpo(*only, "features", "--set", "sae.gate=warn")
    assert warned.code == 0, warned.err
    assert "is not in its place" in warned.err
    opened = open_store(store)
    (features,) = [info for info in list_artifacts(opened) if info.stage == "features"]
    stats = opened.artifact("features", features.version).manifest["stats"]
    assert not stats["gate"]["fits"]
    # What is there is not measured again, and not refused.
    reused = fpo(*only, "features")
    assert reused.code == 0
    assert "SAE at" not in reused.err


def test_a_pass_for_two_artifacts_leaves_it_in_the_features(finished_run):
    store = open_store(finished_run.store)
    (info,) = [info for info in list_artifacts(store) if info.stage == "features"]
    stats = store.artifact("features", info.version).manifest["stats"]
    assert stats["gate"]["place"] == "layer 1 resid_post"
    assert not any("checkpoints" in entry.key for entry in store.backend.list("artifacts/features"))


def test_a_run_that_goes_on_does_not_measure_again_and_refuses_again(recipe, tmp_path, caplog):
    from fpo_core.errors import FPOError
    from fpo_core.sae.coder import load_coder

    def prepared(*overrides):
        return prepare_run(str(recipe), overrides, str(tmp_path / "store"), only="tokenize")[0]

    from tasks.tokenize import tokenize

    run = prepared("sae.gate=warn", "sae.site=final_norm")
    tokenize.fn(run)
    model = load_model(recipe.parent / "model", dtype="float32", attention="sdpa")
    folder = recipe.parent / "sae"
    with run.writers_beside(["features"]) as writers:
        writer = writers["features"]
        assert gate_stats(writer) == {}
        gate_sae(run, writer, model, load_coder(folder), 0, folder)
        made = gate_stats(writer)
    assert made["gate"]["cause"]
    with prepared("sae.site=final_norm").writers_beside(["features"]) as writers:
        assert is_gated(writers["features"])
        gate_sae(run, writers["features"], None, None, 0, folder)  # no model, nothing measured
        assert gate_stats(writers["features"]) == made
    values = yaml.safe_load(recipe.read_text())
    assert values["sae"]["gate"] == "refuse"
    strict = run.recipe.model_copy(
        update={"sae": run.recipe.sae.model_copy(update={"site": "resid_post", "gate": "refuse"})}
    )
    run.recipe = strict
    refused = pytest.raises(FPOError, match="in its place")
    with run.writers_beside(["features"]) as writers, refused:
        gate_sae(run, writers["features"], None, None, 0, folder)
