"""Why a stage is computed: the setting that changed, the stage it follows from, what is begun."""

import json
import shutil

import pytest

from fpo_core.recipe import load_recipe
from storage.location import open_store
from tasks.plan import make_plan
from tasks.reasons import explain_plan


@pytest.fixture
def store(finished_run, tmp_path):
    shutil.copytree(finished_run.store, tmp_path / "store")
    return open_store(tmp_path / "store")


def why(finished_run, store, *overrides):
    plan = make_plan(load_recipe(str(finished_run.recipe), overrides), store)
    return {stage: str(reason) for stage, reason in explain_plan(plan, store).items()}


def test_nothing_to_explain_where_all_is_done(finished_run, store):
    assert why(finished_run, store) == {}


@pytest.mark.parametrize(
    ("setting", "stage", "reason"),
    [
        ("train.alpha=2.0", "train", "train.alpha 0.5 -> 2.0"),
        ("train.lr=1e-4", "train", "train.lr 0.001 -> 0.0001"),
        ("data.max_length=100", "tokenize", "data.max_length 200 -> 100"),
        ("features.tokens_k=9", "features", "features.tokens_k 8 -> 9"),
        ("evaluation.prompts=3", "evaluate", "evaluation.prompts 2 -> 3"),
        ("train.groups=[{name: a, features: [3, 5]}]", "features", "train.groups [] -> [3, 5]"),
    ],
)
def test_the_setting_that_changed_is_named(finished_run, store, setting, stage, reason):
    found = why(finished_run, store, setting)
    assert next(iter(found)) == stage
    assert found[stage] == reason


def test_later_stages_follow_from_the_one_that_changed(finished_run, store):
    found = why(finished_run, store, "data.max_length=100", "train.alpha=2.0")
    assert found["reference"] == "follows from tokenize"
    assert found["train"] == "train.alpha 0.5 -> 2.0; follows from tokenize, reference, features"
    assert found["evaluate"] == "follows from train, tokenize, reference, features"


def test_data_that_changed_is_named_by_its_content(finished_run, store, tmp_path):
    data = (finished_run.recipe.parent / "train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "other.jsonl").write_text("\n".join(data))
    found = why(finished_run, store, f"data.train=[{tmp_path / 'other.jsonl'}]")
    assert found["tokenize"].startswith("train ")
    assert " -> " in found["tokenize"]


def test_an_empty_store_has_nothing_of_its_kind(finished_run, tmp_path):
    found = why(finished_run, open_store(tmp_path / "empty"))
    assert set(found.values()) == {"nothing of this kind is stored"}
    assert list(found) == ["tokenize", "reference", "features", "train", "evaluate"]


def test_of_several_the_nearest_artifact_is_compared_with(finished_run, store):
    """One with a single difference, though another one is newer."""
    (policy,) = store.backend.root.glob("artifacts/policy/*")
    manifest = json.loads((policy / "manifest.json").read_text())
    plan = make_plan(load_recipe(str(finished_run.recipe), ["train.alpha=2.0"]), store)
    (reason,) = (r for s, r in explain_plan(plan, store).items() if s == "train")
    assert reason.since == f"policy/{manifest['version']}"
    assert [change.key for change in reason.changes] == ["train.alpha"]


def test_shards_of_a_stage_that_was_begun_are_counted(finished_run, store):
    (features,) = store.backend.root.glob("artifacts/features/*")
    (features / "manifest.json").unlink()
    for shard in (1, 3):
        (features / "parts" / f"{shard:05}.json").unlink()
    found = why(finished_run, store)
    assert found["features"] == "2 of 4 shards done"


def test_fpo_plan_says_why_for_some_stages(fpo, finished_run, store, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    url = store.url
    shown = fpo("plan", finished_run.recipe, "--store", url, "--set", "train.alpha=2.0")
    assert shown.code == 0, shown.err
    assert "train: train.alpha 0.5 -> 2.0 (against policy/" in shown.out
    one = fpo("plan", finished_run.recipe, "--store", url, "--only", "features", "--json",
              "--set", "features.tokens_k=9")  # fmt: skip
    told = json.loads(one.out)
    assert list(told["stages"]) == ["features"]
    (change,) = told["why"]["features"]["changes"]
    assert (change["key"], change["old"], change["new"]) == ("features.tokens_k", 8, 9)
    assert [stage["stage"] for stage in told["estimates"]["stages"]] == ["features"]
    wrong = fpo("plan", finished_run.recipe, "--store", url, "--only", "feature")
    assert wrong.code == 2
