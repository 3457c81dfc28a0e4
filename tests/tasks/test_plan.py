"""Versions: what enters a stage's address, and what does not."""

import json
import shutil

import pytest
import yaml

from fpo_core.errors import FPOError, UsageError
from fpo_core.recipe import load_recipe
from storage.location import open_store
from tasks.plan import STAGES, Plan, make_plan, selected_stages
from tests.tiny import save_recipe, save_sae

LATER = {stage: {s for s in STAGES if STAGES.index(s) >= STAGES.index(stage)} for stage in STAGES}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return save_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


def versions(path, store, *overrides: str) -> dict[str, str]:
    plan = make_plan(load_recipe(str(path), overrides), store)
    return {stage: planned.version for stage, planned in plan.stages.items()}


def changed(path, store, *overrides: str) -> set[str]:
    before, after = versions(path, store), versions(path, store, *overrides)
    return {stage for stage in before if before[stage] != after[stage]}


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("data.limit=3", "tokenize"),
        ("data.max_length=100", "tokenize"),
        ("data.shard_pairs=2", "tokenize"),
        ("model.attention=eager", "reference"),
        ("model.dtype=bfloat16", "reference"),
        ("train.lr=0.1", "train"),
        ("train.alpha=1.0", "train"),
        ("train.method=dpo", "train"),
        ("train.seed=4", "train"),
        ("evaluation.prompts=1", "evaluate"),
    ],
)
def test_a_setting_changes_its_stage_and_what_follows(recipe, store, override, first):
    assert changed(recipe, store, override) == LATER[first] & set(versions(recipe, store))


@pytest.mark.parametrize("override", ["features.cache_k=32", "features.tokens_k=4", "sae.layer=0"])
def test_feature_settings_leave_the_reference_alone(recipe, store, override):
    assert changed(recipe, store, override) == {"features", "train", "evaluate"}


@pytest.mark.parametrize(
    "override",
    ["resources.threads=2", "resources.tokens_per_batch=64", "resources.ranks=2",
     "resources.inference={runner: ray, workers: 2, cpus: 2}", "name=other",
     "description=words", "train.alpha=0.5", "train.beta=0.1", "monitor.heldout_steps=0",
     "monitor.heldout_pairs=3", "monitor.tensorboard=false", "monitor.wandb=mine",
     "sae.gate=refuse"],
)  # fmt: skip
def test_speed_names_and_written_out_defaults_change_nothing(recipe, store, override):
    assert changed(recipe, store, override) == set()


def test_settings_of_another_method_do_not_matter(recipe, store):
    one = versions(recipe, store, "train.method=dpo")
    assert one == versions(recipe, store, "train.method=dpo", "train.stop_gradient=false")


def test_content_decides_and_not_the_place(recipe, store, tmp_path):
    """Model, SAE and data under other names keep their versions; changed data does not."""
    moved = tmp_path / "moved"
    shutil.copytree(recipe.parent, moved)
    values = yaml.safe_load(recipe.read_text())
    text = json.dumps(values).replace(str(recipe.parent), str(moved))
    (moved / "tiny.yaml").write_text(text)
    assert versions(moved / "tiny.yaml", store) == versions(recipe, store)
    data = moved / "heldout.jsonl"
    data.write_text(data.read_text().replace("fox", "cat"))
    assert versions(moved / "tiny.yaml", store) != versions(recipe, store)


def test_the_weights_of_the_model_enter(recipe, store, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(recipe.parent / "model", moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert changed(recipe, store, f"model.source={moved}") == set(versions(recipe, store))
    (moved / "config.json").write_text((recipe.parent / "model" / "config.json").read_text())
    (moved / "README.md").write_text("A README decides nothing.")
    assert changed(recipe, store, f"model.source={moved}") == set()


def test_versions_are_pinned(recipe, store):
    """A stored cache must be found again after an upgrade: a change here is a decision.

    Of names only: the tiny model's digest follows the releases of torch and safetensors.
    """
    plan = make_plan(load_recipe(str(recipe)), store)
    shapes = {stage: sorted(planned.recipe) for stage, planned in plan.stages.items()}
    assert shapes == {
        "tokenize": ["limit", "max_length", "max_prompt_length", "shard_pairs", "template"],
        "reference": ["attention", "dtype"],
        "features": ["attention", "cache_k", "dtype", "examples", "layer", "pinned", "site",
            "tokens_k", "tokens_share"],
        "train": [
            "activation_checkpointing", "alpha", "attention", "batch_size", "beta",
            "bucket_batches", "epochs", "gamma", "groups", "index_set", "k", "lr",
            "max_grad_norm", "method", "optimizer", "parts", "per_token", "pooled", "schedule",
            "seed", "stop_gradient", "warmup_steps", "window_shards", "zero_stage",
        ],
        "evaluate": [
            "attention", "bootstrap", "k", "max_new_tokens", "prompts", "seed", "temperature",
        ],
    }  # fmt: skip


def test_a_redefined_objective_reuses_no_policy(recipe, store, monkeypatch):
    from fpo_core.recipe.methods import METHODS

    settings = load_recipe(str(recipe))
    before = make_plan(settings, store)
    monkeypatch.setitem(METHODS, "fpo", METHODS["fpo"]._replace(margin="gamma", gamma=0.0))
    after = make_plan(settings, store)
    assert after.version("features") == before.version("features")
    assert after.version("train") != before.version("train")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("sae.layer=99", r"sae\.layer=99: there is no layer 99, the model has layers 0 to 2"),
        ("sae.source={wide}", r"reads activations of width 48 \(d_in\).* is 32; choose an SAE"),
    ],
)
def test_an_sae_that_does_not_fit_the_model_is_refused_by_the_plan(
    recipe, store, tmp_path, change, told
):
    wide = save_sae(tmp_path / "wide", d_in=48)
    with pytest.raises(FPOError, match=told):
        make_plan(load_recipe(str(recipe), [change.format(wide=wide)]), store)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "cohere"}, "architecture 'cohere' is not supported.* Supported: gemma, "),
        (
            {"model_type": "gemma2"},
            "gemma2 soft-caps .* Set model.attention to eager",
        ),
        ({"model_type": "mixtral", "num_local_experts": 4, "hidden_size": 64}, "hidden size is 64"),
        (
            {
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text", "hidden_size": 9},
            },
            "hidden size is 9",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_by_the_plan(recipe, store, tmp_path, config, told):
    model = shutil.copytree(recipe.parent / "model", tmp_path / "model")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(FPOError, match=told):
        make_plan(load_recipe(str(recipe), [f"model.source={model}"]), store)


def test_selection(recipe, store):
    plan = make_plan(load_recipe(str(recipe)), store)
    assert selected_stages(plan, None, None) == [
        "tokenize",
        "reference",
        "features",
        "train",
        "evaluate",
    ]
    done = Plan({n: s._replace(state="complete") for n, s in plan.stages.items()}, ())
    assert selected_stages(done, "features", None) == ["features", "train", "evaluate"]
    assert selected_stages(done, None, "reference") == ["reference"]
    assert selected_stages(plan, None, "tokenize") == ["tokenize"]
    with pytest.raises(FPOError, match="stage 'reference' needs pairs/"):
        selected_stages(plan, None, "reference")
    with pytest.raises(UsageError, match=r"'sae' \(this recipe's SAE is a stored one\)"):
        selected_stages(plan, None, "sae")


def test_selection_with_further_saes(recipe, store, tmp_path):
    """What a stage needs is found by version: the first SAE's artifact is no other's business."""
    also = {"source": str(save_sae(tmp_path / "second", layer=2)), "layer": 2}
    trained = {"text": [{"path": str(recipe.parent / "train.jsonl"), "kind": "preference"}],
               "d_sae": 96, "k": 4, "steps": 10, "lr": 1e-3}  # fmt: skip
    overrides = {"sae.source": None, "sae.train": trained, "sae.also": [also]}
    plan = make_plan(load_recipe(str(recipe), overrides), store)
    assert list(plan.stages) == [
        "sae", "tokenize", "reference", "features", "features@2", "train", "evaluate",
    ]  # fmt: skip

    def complete(*but: str) -> Plan:
        stages = plan.stages.items()
        return Plan({n: s if n in but else s._replace(state="complete") for n, s in stages}, ())

    assert selected_stages(complete("sae"), None, "features@2") == ["features@2"]
    for stage in ("features", "train", "evaluate"):
        with pytest.raises(FPOError, match="needs sae/.*, which stage 'sae' has not made"):
            selected_stages(complete("sae"), None, stage)
    with pytest.raises(FPOError, match="needs features/.*, which stage 'features@2' has not made"):
        selected_stages(complete("features@2"), None, "train")
    assert selected_stages(complete("features@2"), None, "evaluate") == ["evaluate"]


def test_each_place_of_a_further_sae_has_a_stage_of_its_own(recipe, store, tmp_path):
    """One layer may be read at two sites, and one site at two layers."""
    places = [(1, "mlp_out"), (2, "mlp_out"), (2, "resid_post"), (0, "final_norm")]
    also = [
        {"source": str(save_sae(tmp_path / f"{number}")), "layer": layer, "site": site}
        for number, (layer, site) in enumerate(places)
    ]
    plan = make_plan(load_recipe(str(recipe), {"sae.also": also}), store)
    assert [stage for stage in plan.stages if "features" in stage] == [
        "features", "features@1-mlp_out", "features@2-mlp_out", "features@2",
        "features@0-final_norm",
    ]  # fmt: skip
    assert len({plan.version(stage) for stage in plan.stages if "features" in stage}) == 5
