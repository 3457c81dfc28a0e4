"""``fpo run`` with the objectives' options: several SAEs, groups, tokens, and what is refused."""

import json
import re
import shutil

import polars as pl
import pytest

from fpo_core.errors import FPOError
from storage.catalog import list_artifacts
from storage.gc import remove_garbage
from storage.location import open_store
from tasks.run import prepare_run
from tasks.train import training_job
from tasks.training import Places
from tests.tiny import D_SAE, save_recipe, save_sae


def run(fpo, recipe, store, *more):
    return fpo("run", recipe, "--store", store, "--report", store.parent / "report", *more)


def metrics_of(store):
    opened = open_store(store)
    (info,) = (info for info in list_artifacts(opened) if info.stage == "policy")
    return pl.read_parquet(opened.artifact("policy", info.version).path("metrics.parquet"))


@pytest.mark.slow
def test_saes_at_several_layers_groups_and_tokens_in_one_run(fpo, tmp_path):
    """Each SAE's cache is an artifact of its own, which a recipe with only that SAE reuses."""
    store = tmp_path / "store"
    also = {"source": str(save_sae(tmp_path / "sae2", layer=2)), "layer": 2}
    groups = [{"name": "some", "features": [3, 90], "weight": 2.0}]
    recipe = save_recipe(
        tmp_path / "r", sae={"also": [also]}, features={"cache_k": "all", "tokens_k": 16},
        train={"pooled": False, "groups": groups},
    )  # fmt: skip
    result = run(fpo, recipe, store)
    assert result.code == 0, result.err
    assert re.search(r"features@2 +computed", result.err)
    steps = metrics_of(store)
    assert steps["loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert steps["group.some_chosen"][0] < 1e-9
    assert steps["group.some_rejected"][-1] > 0
    opened = open_store(store)
    caches = [info for info in list_artifacts(opened) if info.stage == "features"]
    assert len(caches) == 2
    for info in caches:
        artifact = opened.artifact("features", info.version)
        pooled = artifact.scan("pooled").collect()
        assert pooled["cutoff"].max() == 0  # all are stored
        first = artifact.manifest["recipe"]["layer"] == 1
        assert pooled["pinned"].to_list() == [[3, 90] if first else []] * len(pooled)
    lineage = fpo("store", "lineage", "policy", "--store", store)
    assert lineage.out.count("features/") == 2

    # Weights are no part of the caches; nor is the second SAE part of the first one's.
    lighter = json.dumps([{**groups[0], "weight": 0.5}])
    again = run(fpo, recipe, store, "--set", f"train.groups={lighter}", "--set", "sae.also=[]")
    assert again.code == 0, again.err
    assert again.err.count("reused") == 3  # pairs, reference, features
    assert "features@2" not in again.err


def test_a_loss_that_is_not_finite_keeps_its_batch_with_the_run(fpo, finished_run, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(finished_run.store, store)
    more = ("--set", "train.lr=1e30", "--set", "train.max_grad_norm=1e30")
    result = run(fpo, finished_run.recipe, store, *more)
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "step 2: the loss is not finite for pair" in result.err
    (kept,) = store.glob("runs/*/bad-batch-step2-rank0.parquet")
    assert f"in the store: {kept.relative_to(store)}" in " ".join(result.err.split())
    rows = pl.read_parquet(kept)
    assert rows["loss"].is_nan().all()
    assert rows["side"].to_list() == ["chosen", "rejected"] * (rows.height // 2)
    # It goes with the record of its run, when a newer one names the same artifacts.
    assert run(fpo, finished_run.recipe, store).code == 0
    remove_garbage(open_store(store), keep_runs_days=0, grace_hours=0)
    assert not kept.exists()


def test_an_sae_that_changes_during_a_run_is_noticed(fpo, finished_run, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(finished_run.recipe.parent, folder, ignore=shutil.ignore_patterns("report"))
    text = finished_run.recipe.read_text().replace(str(finished_run.recipe.parent), str(folder))
    (folder / "tiny.yaml").write_text(text)
    prepared, _ = prepare_run(str(folder / "tiny.yaml"), (), str(folder / "store"))
    assert training_job(prepared, Places(tmp_path, tmp_path)).saes
    weights = folder / "sae" / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FPOError, match=r"`features` was made with the sae .*, and .* now"):
        training_job(prepared, Places(tmp_path, tmp_path))


GROUP = {"name": "far", "features": [3, D_SAE]}
AFTER_NORM = {"site": "final_norm"}
REFUSED = {
    "a feature that the SAE does not have": (
        {"train": {"groups": [GROUP]}},
        f"train.groups, far: feature {D_SAE} is not in the SAE", f"0 to {D_SAE - 1}",
    ),
    "a group under an objective without features": (
        {"train": {"method": "dpo", "groups": [{"name": "a", "features": [1]}]}},
        "dpo constrains none; set their weight to 0", "or train.method to fpo",
    ),
    "two groups of one name": (
        {"train": {"groups": [{"name": "a", "features": [1]}, {"name": "a", "features": [2]}]}},
        "train.groups: a name is used twice",
    ),
    "a feature twice in a group": (
        {"train": {"groups": [{"name": "a", "features": [1, 1]}]}}, "named twice: 1",
    ),
    "tokens cut shorter than k": (
        {"train": {"pooled": False, "k": 9}},
        "train.pooled=false compares the top 9", "features.tokens_k stores 8",
    ),
    "k near the cache's edge": (
        {"train": {"k": 33}}, "train.k=33 needs a cache of twice as many", "cache_k stores 64",
    ),
    "k beyond the SAE": (
        {"train": {"k": D_SAE + 1}, "features": {"cache_k": "all"}},
        f"train.k={D_SAE + 1}, but the SAE", f"has only {D_SAE} features",
    ),
    "two SAEs at one place": (
        {"sae": {"also": [{"source": "x", "layer": 1}]}}, "two SAEs at one place: layer 1",
    ),
    "two SAEs after the final norm": (
        {"sae": {"site": "final_norm", "also": [{"source": "x", "layer": 2, **AFTER_NORM}]}},
        "two SAEs at one place: layer 1 final_norm, layer 2 final_norm",
    ),
    "alpha without a constraint": (
        {"train": {"method": "simpo", "alpha": 1.0}}, "simpo has none to weigh",
    ),
    "an unknown objective": (
        {"train": {"method": "tdpo"}}, "unknown objective; did you mean 'tdpo", "Objectives: fpo",
    ),
    "an unknown index set": ({"train": {"index_set": "both"}}, "'union', 'policy' or 'reference'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit_are_refused_before_anything_runs(fpo, tmp_path, case):
    sections, *messages = REFUSED[case]
    result = run(fpo, save_recipe(tmp_path / "r", **sections), tmp_path / "store")
    assert result.code in (1, 2)
    assert "Traceback" not in result.err
    for message in messages:
        assert message in " ".join(result.err.split()), result.err
    assert list_artifacts(open_store(tmp_path / "store")) == []
