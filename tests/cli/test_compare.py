"""``fpo compare`` on artifacts of real runs: values, names, what is written and what is refused."""

import json
import re
import shutil

import polars as pl
import pytest

from fpo_core.errors import FPOError, UsageError
from storage.location import open_store
from storage.manifest import Made
from storage.version import artifact_version
from tasks.compare import compare_runs
from tasks.finished import StoredRuns
from tests.fpo_core.report.test_comparison import parsed_latex
from tests.fpo_core.report.test_page import read


@pytest.fixture(scope="module")
def two_runs(finished_run, tmp_path_factory):
    """The store of the finished run, with one of another objective on the same caches."""
    from cli.main import main

    folder = tmp_path_factory.mktemp("two")
    store = folder / "store"
    shutil.copytree(finished_run.store, store)
    with pytest.raises(SystemExit) as left:
        main(["run", str(finished_run.recipe), "--store", str(store), "--set", "train.method=dpo",
              "--report", str(folder / "report"), "--set", "monitor.heldout_steps=2"])  # fmt: skip
    assert not left.value.code
    evaluations = {}
    for run in open_store(store).runs().values():
        assert run is not None
        evaluations[run["settings"]["train"].get("method", "fpo")] = run
    return store, evaluations


@pytest.fixture
def copied(two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / "store")
    return open_store(tmp_path / "store"), two_runs[1]


def metrics_of(store, name):
    path = open_store(store).artifact(*name.split("/")).path("metrics.json")
    return {metric["key"]: metric for metric in json.loads(path.read_text())}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def test_two_runs_are_compared_and_everything_written(fpo, two_runs, tmp_path):
    store, runs = two_runs
    names = [runs[method]["artifacts"]["evaluate"] for method in ("fpo", "dpo")]
    result = fpo("compare", *names, "--store", store, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    assert "DPO against FPO" in result.out
    assert "Length of sampled answers (tokens)" in result.out
    _, page = read(tmp_path / "out" / "compare.html")
    assert "They differ in Method." in page.text
    for table in (tmp_path / "out" / "tables").iterdir():
        parsed_latex(table.read_text())
    head = pl.read_parquet(tmp_path / "out" / "data" / "table_accuracy_entropy.parquet")
    assert head["run"].to_list() == ["reference", "FPO", "DPO"]
    for method, name in zip(("FPO", "DPO"), names, strict=True):
        row = head.row(by_predicate=pl.col("run") == method, named=True)
        for key in ("accuracy", "entropy"):
            assert row[key] == metrics_of(store, name)[key]["policy"]["value"]
    for figure in ("kl_chosen", "discrepancy_margin", "accuracy_entropy", "cost_seconds"):
        assert (tmp_path / "out" / "figures" / f"{figure}.png").stat().st_size > 5000
        assert pl.read_parquet(tmp_path / "out" / "data" / f"figure_{figure}.parquet").height


def test_json_has_the_evaluations_own_values(fpo, two_runs, tmp_path):
    """Values and intervals of metrics.json, and the difference of the two per-pair tables."""
    store, runs = two_runs
    names = [runs[method]["run"] for method in ("dpo", "fpo")]  # by the ids of the runs
    result = fpo("compare", *names, "--store", store, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    evaluations = [runs[method]["artifacts"]["evaluate"] for method in ("dpo", "fpo")]
    assert told["evaluations"] == evaluations
    assert told["names"] == ["DPO", "FPO"]
    stored = [metrics_of(store, name) for name in evaluations]
    assert {metric["key"] for metric in told["metrics"]} == set(stored[0])
    for metric in told["metrics"]:
        for own, shown in zip(stored, metric["runs"], strict=True):
            assert shown == pytest.approx(own[metric["key"]]["policy"])
        if stored[0][metric["key"]]["reference"]:
            assert metric["reference"] == pytest.approx(stored[0][metric["key"]]["reference"])
    opened = open_store(store)
    frames = [
        pl.read_parquet(opened.artifact(*name.split("/")).path("pairs.parquet"))
        for name in evaluations
    ]
    joined = frames[0].join(frames[1], on="pair_id", suffix="_fpo")
    kl = next(metric for metric in told["metrics"] if metric["key"] == "kl_chosen")
    wanted = (joined["kl_chosen_fpo"] - joined["kl_chosen"]).to_numpy().mean()
    assert kl["differences"][0]["estimate"]["value"] == pytest.approx(wanted)


def test_a_run_has_many_names(two_runs):
    store, runs = two_runs
    opened = open_store(store)
    stored = StoredRuns(opened)
    fpo_run, dpo_run = runs["fpo"], runs["dpo"]
    wanted = [fpo_run["artifacts"]["evaluate"], dpo_run["artifacts"]["evaluate"]]
    policy = fpo_run["artifacts"]["train"]
    version = wanted[0].partition("/")[2]
    for first in (wanted[0], wanted[0][:-6], version, version[:8], policy, policy[:-4],
                  fpo_run["run"]):  # fmt: skip
        # The recipe's ref is to what it last made.
        found = stored.find([first, "tiny"])
        assert [run.evaluation.name for run in found] == wanted, first
    settings = found[0].settings
    assert settings["train.method"] == "fpo"
    assert settings["sae.layer"] == "1"
    assert settings["sae.site"] == "resid_post"
    assert settings["sae"].startswith("sae (")
    assert settings["model.dtype"] == "float32"


def test_names_that_do_not_serve_are_told(fpo, copied, tmp_path):
    store, runs = copied
    evaluation = runs["fpo"]["artifacts"]["evaluate"]
    listing = f"{evaluation}  (recipe tiny, fpo)"

    def refused(*names, code=1):
        result = fpo("compare", *names, "--store", store.url, "-o", tmp_path / "out")
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        return result.err

    for names in ((), ("tiny",)):
        told = refused(*names, code=2)
        assert "at least two runs" in told
        assert listing in told
    assert listing in refused(evaluation, "quickstrat")
    told = refused(evaluation, evaluation[:-3], code=2)
    assert f"'{evaluation}' and '{evaluation[:-3]}' are the same run" in told
    assert "'evaluation' is ambiguous: " in refused("evaluation", "tiny")
    store.set_ref("half", "pairs", "0" * 16)
    assert "recipe 'half' has no finished evaluation" in refused("half", "tiny")
    store.put_run("20200101T000000-0", {"run": "x", "state": "failed", "artifacts": {}})
    assert "run 20200101T000000-0 (failed) has no finished" in refused("2020", "tiny")
    assert not (tmp_path / "out").exists()
    empty = fpo("compare", "a", "b", "--store", tmp_path / "none")
    assert "holds no finished evaluation; `fpo run quickstart`" in empty.err


def remade(store, name, files=None, recipe=None, inputs=None):
    """An artifact like another one, with other files, settings or inputs, through the writer."""
    old = store.artifact(*name.split("/"))
    manifest = old.manifest
    recipe = {**manifest["recipe"], **(recipe or {})}
    inputs = {**manifest["inputs"], **(inputs or {})}
    schema = manifest["schema_version"]
    version = artifact_version(stage=old.stage, schema_version=schema, recipe=recipe, inputs=inputs)
    with store.hold(old.stage, version, None) as hold:
        writer = store.writer(old.stage, version, hold)
        for file in old.files:
            content = (files or {}).get(file) or old.path(file).read_bytes()
            writer.put_bytes(file, content)
        made = Made(schema, recipe, inputs, manifest["stats"], 1.0, manifest["provenance"])
        return writer.commit(made).name


def test_a_policy_with_two_evaluations_asks_for_one(copied):
    store, runs = copied
    name = runs["fpo"]["artifacts"]["evaluate"]
    more = remade(store, name, recipe={"seed": 3})
    policy = runs["fpo"]["artifacts"]["train"]
    with pytest.raises(FPOError, match=f"{policy} has several evaluations; name one: evaluation"):
        StoredRuns(store).find([policy, "tiny"])
    # Another seed of the sampling is no other metric. That the second one has no record, which
    # names its model and data, makes no difference between them either.
    compared = compare_runs(store, [name, more])
    assert not compared.report.refused
    assert compared.report.columns == ("evaluation.seed",)


def test_another_sae_leaves_the_discrepancy_out_and_says_so(fpo, copied, tmp_path):
    store, runs = copied
    name = runs["dpo"]["artifacts"]["evaluate"]
    other = remade(store, name, inputs={"sae": "sae:" + "f" * 64})
    first = runs["fpo"]["artifacts"]["evaluate"]
    result = fpo("compare", first, other, "--store", store.url, "-o", tmp_path / "out")
    assert result.code == 0, result.err
    told = " ".join(result.out.split())
    (reason,) = set(re.findall(r"not compared: Feature discrepancy, chosen: (.*?\))", told))
    assert reason.startswith("they differ in the SAE (FPO: sae:")
    assert "; DPO: sae:ffff" in reason
    assert "Sequential KL, chosen (nats)" in told
    _, page = read(tmp_path / "out" / "compare.html")
    assert "Not compared, because the values do not mean the same" in page.text


def test_other_pairs_are_refused_by_name(copied, tmp_path):
    store, runs = copied
    name = runs["dpo"]["artifacts"]["evaluate"]
    artifact = store.artifact(*name.split("/"))
    pairs = pl.read_parquet(artifact.path("pairs.parquet"))
    answers = pl.read_parquet(artifact.path("answers.parquet"))
    pairs[1:].write_parquet(tmp_path / "pairs.parquet")
    answers[1:].write_parquet(tmp_path / "answers.parquet")
    files = {f"{t}.parquet": (tmp_path / f"{t}.parquet").read_bytes() for t in ("pairs", "answers")}
    other = remade(store, name, files=files, recipe={"bootstrap": 100})
    lost = pairs["pair_id"][0]
    with pytest.raises(FPOError, match=f"no metric.*held-out pairs .1 only in FPO.*{lost}"):
        compare_runs(store, [runs["fpo"]["artifacts"]["evaluate"], other])


def test_scores_of_a_policy_are_in_the_comparison(copied, tmp_path):
    """The records that a bench stage leaves, by hand, on an artifact made from the policy."""
    store, runs = copied
    record = {
        "key": {"judge": {"model": "j"}, "decoding": {"temperature": 0.7}}, "opponent": "baseline",
        "benchmark": "arena_hard", "temperature": 0.7,
        "scores": [{"name": "win_rate", "label": "Win rate", "unit": "%", "value": 51.2,
                    "low": 49.0, "high": 53.5, "judged": 998, "asked": 1000}],
    }  # fmt: skip
    for method in ("fpo", "dpo"):
        inputs = {"policy": runs[method]["artifacts"]["train"].partition("/")[2]}
        version = artifact_version(stage="scores", schema_version=1, recipe={}, inputs=inputs)
        with store.hold("scores", version, None) as hold:
            writer = store.writer("scores", version, hold)
            writer.put_bytes("scores.json", json.dumps([record]).encode())
            writer.commit(Made(1, {}, inputs, {}, 1.0, {}))
    names = [runs[method]["artifacts"]["evaluate"] for method in ("fpo", "dpo")]
    (table,) = compare_runs(store, names).report.scores
    assert [row.run for row in table.rows] == ["FPO", "DPO"]
    assert table.rows[1].cells["win_rate"].judged == 998


def test_comparing_needs_two_runs(two_runs):
    with pytest.raises(UsageError, match="at least two runs, 1 given"):
        compare_runs(open_store(two_runs[0]), ["tiny"])


def test_help_teaches_by_example(fpo):
    text = fpo("compare", "--help").out
    assert "fpo compare quickstart smollm2-sae -o reports/saes" in text
    assert "evaluation/VERSION" in text
    assert "fpo compare" in fpo("--help").out
