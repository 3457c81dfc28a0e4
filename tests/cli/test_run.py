"""``fpo run`` on a tiny recipe: what is computed, what reused, how mistakes are answered."""

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.catalog import list_artifacts
from storage.location import open_store
from tests.tiny import save_model, save_recipe, save_sae

ARTIFACTS = ("pairs", "reference", "features", "policy", "evaluation")


@pytest.fixture
def copied(finished_run, tmp_path):
    """The finished store, to be changed."""
    shutil.copytree(finished_run.store, tmp_path / "store")
    return finished_run._replace(store=tmp_path / "store", report=tmp_path / "report")


def manifests(store: Path) -> dict[str, dict]:
    """By artifact name and version."""
    opened = open_store(store)
    return {
        f"{info.stage}/{info.version}": dict(opened.artifact(info.stage, info.version).manifest)
        for info in list_artifacts(opened)
    }


def run(fpo, recipe: Path, store: Path, *more: object):
    return fpo("run", recipe, "--store", store, "--report", store.parent / "report", *more)


def test_a_run_makes_every_artifact_and_a_report(finished_run):
    found = manifests(finished_run.store)
    assert sorted(name.partition("/")[0] for name in found) == sorted(ARTIFACTS)
    for manifest in found.values():
        assert manifest["files"]
        assert manifest["seconds"] >= 0
        assert manifest["provenance"]["packages"]["torch"]
    assert (finished_run.report / "report.html").is_file()
    assert (finished_run.report / "charts" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [p for p in (finished_run.store / "scratch").iterdir() if p.suffix != ".lock"] == []


def test_a_bad_hostfile_is_told_before_any_stage(fpo, finished_run, tmp_path):
    (tmp_path / "hosts").write_text("node-1 slots=2\nnode-2\n")
    to_hosts = ("--set", f"resources.hostfile={tmp_path / 'hosts'}")
    done = run(fpo, finished_run.recipe, tmp_path / "store", *to_hosts)
    assert done.code == 1
    assert "hosts, line 2: 'node-2' is not `HOST slots=N`" in done.err
    assert not (tmp_path / "store" / "artifacts").exists()


def test_the_time_to_the_first_step_is_recorded(finished_run):
    (policy,) = (made for name, made in manifests(finished_run.store).items() if "policy" in name)
    assert 1 < policy["stats"]["seconds_to_first_step"] < policy["seconds"]


def test_manifests_name_no_path_of_this_machine(finished_run):
    text = json.dumps(manifests(finished_run.store))
    assert str(finished_run.store.parent) not in text
    assert str(Path.home()) + "/" not in text


def test_the_first_step_is_at_log_2_and_held_out_metrics_are_stored(finished_run):
    store = open_store(finished_run.store)
    found = {info.stage: info.version for info in list_artifacts(store)}
    steps = pl.read_parquet(store.artifact("policy", found["policy"]).path("metrics.parquet"))
    assert steps["loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert steps["discrepancy_chosen"][0] < 1e-9
    assert steps["grad_norm"].is_not_null().all()
    evaluation = store.artifact("evaluation", found["evaluation"])
    records = json.loads(evaluation.path("metrics.json").read_text())
    metrics = {record["key"]: record for record in records}
    assert 0 <= metrics["accuracy"]["policy"]["value"] <= 1
    assert metrics["kl_chosen"]["policy"]["value"] > 0
    answers = pl.read_parquet(evaluation.path("answers.parquet"))
    assert answers["prompt"].to_list() == ["What is number 100?", "What is number 101?"]


def test_the_policy_has_its_held_out_figures_and_event_file(finished_run):
    """Of the six pairs before the first step and after the last; the step's curve beside them."""
    store = open_store(finished_run.store)
    (version,) = (info.version for info in list_artifacts(store) if info.stage == "policy")
    policy = store.artifact("policy", version)
    heldout = pl.read_parquet(policy.path("heldout.parquet"))
    assert heldout["step"].to_list() == [0, 3]
    assert heldout["pairs"].to_list() == [6, 6]
    assert heldout["kl_chosen"][0] == pytest.approx(0, abs=1e-5)
    assert heldout["kl_chosen"][1] > heldout["kl_chosen"][0]
    assert heldout["discrepancy_chosen"][0] < 1e-9
    low, high = (heldout[f"fvu_{end}.1-resid_post"][0] for end in ("low", "high"))
    assert low < heldout["fvu.1-resid_post"][0] < high
    names = [name for name in policy.manifest["files"] if name.startswith("tensorboard/")]
    assert names == ["tensorboard/events.out.tfevents.0"]  # no machine's name
    events = EventAccumulator(str(policy.path(names[0])))
    events.Reload()
    steps = pl.read_parquet(policy.path("metrics.parquet"))
    for section, table in (("train", steps), ("heldout", heldout)):
        read = events.Scalars(f"{section}/loss")
        assert [event.step for event in read] == table["step"].to_list()
        assert [event.value for event in read] == pytest.approx(table["loss"].to_list())


def test_a_second_run_computes_nothing_and_leaves_the_report(fpo, finished_run):
    before = manifests(finished_run.store)
    page = finished_run.report / "report.html"
    written = page.stat().st_mtime_ns
    result = fpo("run", finished_run.recipe, "--store", finished_run.store,
                 "--report", finished_run.report)  # fmt: skip
    assert result.code == 0
    assert result.err.count("reused") == 5
    assert str(page) in result.err
    assert manifests(finished_run.store) == before
    assert page.stat().st_mtime_ns == written


def test_another_alpha_trains_and_evaluates_only(fpo, copied, wandb_offline):
    """And W&B gets what the recipe asks to be sent: here into a file, as its mode says."""
    before = manifests(copied.store)
    result = run(
        fpo, copied.recipe, copied.store, "--set", "train.alpha=1.0", "--set", "monitor.wandb=mine"
    )
    assert result.code == 0
    assert re.search(r"held-out before training: loss 0\.693, .*FVU [\d.]+, L0 [\d.]+", result.err)
    assert "held-out after step 3: loss" in result.err
    assert result.err.count("reused") == 3
    after = manifests(copied.store)
    assert sorted(name.partition("/")[0] for name in set(after) - set(before)) == [
        "evaluation", "policy",
    ]  # fmt: skip
    assert all(after[name] == manifest for name, manifest in before.items())
    (version,) = (n.partition("/")[2] for n in set(after) - set(before) if n.startswith("policy/"))
    (sent,) = (wandb_offline).glob(f"wandb/offline-run-*/run-{version}.wandb")
    assert b"tiny-fpo" in sent.read_bytes()


def test_forcing_one_stage_gives_the_same_bytes(fpo, copied):
    before = manifests(copied.store)
    result = run(fpo, copied.recipe, copied.store, "--only", "features", "--force")
    assert result.code == 0
    (name,) = (name for name in before if name.startswith("features/"))
    after = manifests(copied.store)[name]
    assert after["files"] == before[name]["files"]
    assert re.search(r"features +computed", result.err)
    assert "train" not in result.err


def test_reference_and_features_give_the_same_bytes_in_two_passes_as_in_one(fpo, copied):
    before = manifests(copied.store)
    for stage in ("reference", "features"):
        assert run(fpo, copied.recipe, copied.store, "--only", stage, "--force").code == 0
    after = manifests(copied.store)
    for name in before:
        if name.startswith(("reference/", "features/")):
            assert after[name]["files"] == before[name]["files"], name


def test_from_a_stage_whose_inputs_are_missing(fpo, tmp_path):
    recipe = save_recipe(tmp_path)
    result = run(fpo, recipe, tmp_path / "store", "--from", "train")
    assert result.code == 1
    assert "stage 'train' needs pairs/" in result.err
    assert "with --from tokenize" in result.err


def test_a_damaged_cache_is_named_and_the_remedy_works(fpo, copied):
    (name,) = (name for name in manifests(copied.store) if name.startswith("features/"))
    shard = copied.store / "artifacts" / name / "data" / "pooled" / "00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])
    result = run(fpo, copied.recipe, copied.store, "--set", "train.seed=1")
    assert result.code == 1
    assert f"{name} is damaged: pooled/00001.parquet: it has" in result.err
    assert f"`fpo store repair {name}` computes again what is damaged" in result.err
    before = manifests(copied.store)[name]
    repaired = fpo("store", "repair", name, "--store", copied.store)
    assert repaired.code == 0, repaired.err
    assert f"{name}: pooled/00001.parquet computed again, as before" in repaired.out
    assert manifests(copied.store)[name]["files"] == before["files"]
    assert run(fpo, copied.recipe, copied.store, "--set", "train.seed=1").code == 0


# ---- bad input: each is one sentence on stderr, with what to do, and exit code 1 (2: wrong usage)


def rows(*texts: str):
    def change(folder: Path) -> dict:
        path = folder / "bad.jsonl"
        path.write_text("\n".join(texts))
        return {"data": {"train": [str(path)]}}

    return change


def pair(**changed: object) -> str:
    row = {"prompt": "why?", "chosen": "the fox", "rejected": "the dog", **changed}
    return json.dumps({key: value for key, value in row.items() if value is not None})


def no_tokenizer(folder: Path) -> dict:
    model = save_model(folder / "bare")
    (model / "tokenizer.json").unlink()
    return {"model": {"source": str(model)}}


def other_sae(folder: Path) -> dict:
    return {"sae": {"source": str(save_sae(folder / "narrow", d_in=24))}}


def other_layer(folder: Path) -> dict:
    return {"sae": {"layer": 2}}


def odd_sae(folder: Path) -> dict:
    return {"sae": {"source": str(save_sae(folder / "odd", architecture="transcoder"))}}


def half_model(folder: Path) -> dict:
    path = save_model(folder / "half") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return {"model": {"source": str(path.parent)}}


BAD = {
    "data file missing": (
        lambda folder: {"data": {"train": [str(folder / "none.jsonl")]}},
        ["none.jsonl' does not exist", "relative path starts"],
    ),
    "data file empty": (rows(""), ["bad.jsonl' is empty"]),
    "not JSON at a line": (rows(pair(), "{no json}"), ["bad.jsonl, line 2: not JSON"]),
    "no chosen": (
        rows(pair(chosen=None)),
        ["no example of the train split is left", "bad.jsonl, line 1: the row has no 'chosen'"],
    ),
    "too many rows of no use": (
        rows(*[pair(prompt=f"{n}?") for n in range(9)], pair(chosen=None), pair(chosen=None)),
        ["2 of 11 rows of the train split cannot be used", "2 x a response has no assistant turn",
         "bad.jsonl, line 10", "raise data.max_bad_share=0.05"],
    ),
    "chosen equals rejected everywhere": (
        rows(pair(rejected="the fox")),
        ["no example of the train split is left", "1 x chosen and rejected are the same",
         "bad.jsonl, line 1"],
    ),
    "every prompt too long": (
        lambda _: {"data": {"max_prompt_length": 5}},
        ["no example of the train split is left", "12 x the prompt alone is too long",
         "train.jsonl, line 1: the prompt has", "Raise max_length"],
    ),
    "model folder without a tokenizer": (
        no_tokenizer, ["the folder has no tokenizer", "tokenizer.save_pretrained"],
    ),
    "model cut short": (half_model, ["model folder half could not be loaded"]),
    "no such model folder": (
        lambda _: {"model": {"source": "./nowhere"}}, ["'./nowhere': no such folder"],
    ),
    "SAE of another width": (
        other_sae, ["it reads activations of width 24 (d_in)", "hidden size is 32"],
    ),
    "SAE of another layer": (
        other_layer, ["declares the hookpoint 'blocks.1.hook_resid_post'", "layer 2 resid_post"],
    ),
    "SAE of an unknown kind": (odd_sae, ["architecture 'transcoder' is not supported (it"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_in_words(fpo, tmp_path, case):
    change, messages = BAD[case]
    recipe = save_recipe(tmp_path / "r", **change(tmp_path))
    result = run(fpo, recipe, tmp_path / "store")
    assert result.code == 1
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err + result.out
    for message in messages:
        assert message in result.err
    # Nothing half-written reads as whole: shards of a split that is refused stay unfinished.
    states = {info.state for info in list_artifacts(open_store(tmp_path / "store"))}
    assert states <= {"complete", "partial"}
    if "cannot be used" in result.err:
        assert states == {"partial"}


def test_single_bad_pairs_are_told_and_left_out(fpo, tmp_path):
    recipe = save_recipe(tmp_path)
    data = tmp_path / "train.jsonl"
    same = {"prompt": "q?", "chosen": "same", "rejected": "same"}
    long = {"prompt": "why " * 300, "chosen": "a", "rejected": "b"}
    data.write_text(data.read_text() + json.dumps(same) + "\n" + json.dumps(long) + "\n")
    result = run(fpo, recipe, tmp_path / "store", "--only", "tokenize")
    assert result.code == 0
    assert "1 pair dropped: chosen and rejected are the same" in result.err
    assert "train.jsonl, line 13" in result.err
    store = open_store(tmp_path / "store")
    (info,) = list_artifacts(store)
    listed = store.artifact("pairs", info.version).path("dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in listed] == ["identical", "prompt_too_long"]


def test_a_store_that_cannot_be_written(fpo, tmp_path):
    recipe = save_recipe(tmp_path)
    (tmp_path / "file").write_text("")
    result = run(fpo, recipe, tmp_path / "file" / "store")
    assert result.code == 1
    assert "cannot be written" in result.err
    assert "--store or FPO_STORE" in result.err


def test_hub_data_and_models_that_cannot_be_had(fpo, tmp_path):
    data = fpo("run", "gemma2b", "--store", tmp_path / "store")
    assert data.code == 1
    assert "not reachable from here: model google/gemma-2-2b, data HuggingFaceH4/" in data.err
    assert "(a dataset's split as a Parquet or JSONL file)" in data.err
    recipe = save_recipe(tmp_path / "r", model={"source": "nobody/no-such-model"})
    model = run(fpo, recipe, tmp_path / "store")
    assert model.code == 1
    assert "not reachable from here: model nobody/no-such-model" in model.err
    assert "Traceback" not in data.err + model.err


USAGE = {
    "unknown recipe": (["run", "quickstrat"], "did you mean 'quickstart'?"),
    "unknown key": (["run", "quickstart", "--set", "train.alhpa=1"], "did you mean 'alpha'?"),
    "unknown stage": (["run", "quickstart", "--only", "evaluation"], "stages: tokenize, reference"),
    "both selections": (
        ["run", "quickstart", "--only", "train", "--from", "train"], "cannot be used together",
    ),
    "unknown command": (["rnu"], "No such command"),
    "unknown option": (["run", "quickstart", "--fast"], "No such option"),
    "no recipe": (["run"], "Missing argument"),
}  # fmt: skip


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_exits_with_2(fpo, tmp_path, case, monkeypatch):
    arguments, message = USAGE[case]
    monkeypatch.setenv("FPO_STORE", str(tmp_path / "store"))
    result = fpo(*arguments)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


# ---- looking


def test_plan_says_what_would_run(fpo, finished_run):
    result = fpo("plan", finished_run.recipe, "--store", finished_run.store, "--set", "train.lr=1")
    assert result.code == 0
    table = result.out.partition("estimates")[0].splitlines()
    actions = [line.split()[1] for line in table if re.match(r" \S+ +\S+ +\S+/", line)]
    assert actions == ["reuse", "reuse", "reuse", "compute", "compute"]
    assert "train: train.lr 0.001 -> 1.0 (against policy/" in " ".join(result.out.split())


def test_plan_works_without_the_hub(fpo, tmp_path):
    result = fpo("plan", "gemma2b", "--store", tmp_path / "store")
    assert result.code == 0
    assert "not reachable from here: model google/gemma-2-2b" in " ".join(result.out.split())
    assert result.out.count("compute") == 7
    assert not (tmp_path / "store").exists()


def test_store_ls_and_show(fpo, finished_run):
    listed = fpo("store", "ls", "--store", finished_run.store)
    assert listed.code == 0
    for name in ARTIFACTS:
        assert f"{name}/" in listed.out
    (name,) = (n for n in manifests(finished_run.store) if n.startswith("features/"))
    shown = fpo("store", "show", name[:14], "--store", finished_run.store)
    assert shown.code == 0
    assert '"cache_k": 64' in shown.out
    assert "pooled/00000.parquet" in shown.out
    unknown = fpo("store", "show", "ffffffff", "--store", finished_run.store)
    assert unknown.code == 1
    assert "fpo store ls" in unknown.err
    empty = fpo("store", "ls", "--store", finished_run.store.parent / "none")
    assert "is empty" in empty.out


def test_report_is_written_again_from_the_store(fpo, finished_run, tmp_path):
    result = fpo("report", finished_run.recipe, "--store", finished_run.store, "-o", tmp_path / "r")
    assert result.code == 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "What is number 100?" in page
    missing = fpo("report", finished_run.recipe, "--store", tmp_path / "none")
    assert missing.code == 1
    assert "has not finished in the store" in missing.err


def test_help_teaches_by_example(fpo):
    assert "fpo run quickstart --set train.method=dpo" in fpo("--help").out
    assert "fpo run quickstart --from train --force" in fpo("run", "--help").out
    assert fpo().code in (0, 2)


def test_a_token_budget_below_the_longest_pair_of_any_shard_is_told_first(fpo, copied):
    pairs = pl.read_parquet(next(copied.store.glob("artifacts/pairs/*/data")) / "*.parquet")
    parts = [pl.col(f"{part}_ids").list.len() for part in ("prompt", "chosen", "rejected")]
    longest = pairs.select("pair_id", tokens=pl.sum_horizontal(parts)).sort("tokens")[-1]
    pair_id, tokens = longest.row(0)
    settings = ("--set", "features.examples=3", "--set", "resources.inference.tokens_per_batch=9")
    result = run(fpo, copied.recipe, copied.store, "--only", "features", *settings)
    assert result.code == 1
    assert f"tokens_per_batch=9 is too small for pair {pair_id}, which has {tokens}" in result.err
    assert "SAE at" not in result.err
