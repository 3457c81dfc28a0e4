"""``fpo cache`` on a finished run: what is shown, as JSON and Parquet too, and what is refused."""

import json
import shutil

import polars as pl
import pytest


@pytest.fixture
def store(finished_run, tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(finished_run.store, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def cache(fpo, store):
    def call(*arguments: object):
        return fpo("cache", *arguments, "--store", store)

    return call


def test_caches_and_their_features(cache, tmp_path):
    listed = json.loads(cache("ls", "--json").out)
    assert [one["refs"] for one in listed] == [["tiny"]]
    shown = cache("features", "tiny", "-n", 3, "--sort", "density")
    assert shown.code == 0, shown.err
    rows = json.loads(cache("features", "tiny", "-n", 3, "--sort", "density", "--json").out)
    assert [row["density"] for row in rows] == sorted((r["density"] for r in rows), reverse=True)
    cache("features", "tiny", "-n", 1000, "--parquet", tmp_path / "all.parquet")
    assert pl.read_parquet(tmp_path / "all.parquet").height == 96
    cache("ls", "--parquet", tmp_path / "caches.parquet")
    (found,) = pl.read_parquet(tmp_path / "caches.parquet").to_dicts()
    assert (found["name"], found["refs"]) == (f"features/{listed[0]['version']}", ["tiny"])


def test_a_feature_a_pair_and_a_label(cache, store, tmp_path):
    (row,) = json.loads(cache("features", "tiny", "-n", 1, "--sort", "max", "--json").out)
    number = row["feature"]
    assert cache("label", "tiny", number, "a fox").code == 0
    shown = cache("feature", "tiny", number)
    assert f"feature {number} of features/" in shown.out
    assert "a fox" in shown.out
    told = json.loads(cache("feature", "tiny", number, "--json").out)
    assert sum(told["histogram"]["chosen"]) + told["histogram"]["without"][0] == 18
    example = told["examples"][0]
    assert told["logits"] is None
    raised = json.loads(cache("feature", "tiny", number, "--logits", "--json").out)["logits"][
        "raised"
    ]
    assert raised == sorted(raised, key=lambda one: -one["effect"])
    assert "logits lowered: " in cache("feature", "tiny", number, "--logits").out
    cache("feature", "tiny", number, "--parquet", tmp_path / "examples.parquet")
    pieces = pl.read_parquet(tmp_path / "examples.parquet")
    assert pieces["text"].to_list()[: len(example["pieces"])] == [
        piece["text"] for piece in example["pieces"]
    ]
    cache("pair", "tiny", example["pair_id"], "--parquet", tmp_path / "pair.parquet")
    gaps = pl.read_parquet(tmp_path / "pair.parquet")["difference"].abs().to_list()
    assert gaps == sorted(gaps, reverse=True)
    pair = cache("pair", "tiny", example["pair_id"], "--feature", number)
    assert pair.code == 0, pair.err
    assert "What is number" in pair.out.replace("\n", " ")
    assert cache("diff", "tiny", "tiny").code == 0
    (policy,) = (store / "artifacts" / "policy").iterdir()
    (audit,) = store.glob("artifacts/evaluation/*/data/audit.parquet")
    cache("diff", "tiny", f"policy/{policy.name[:6]}", "--parquet", tmp_path / "moved.parquet")
    assert pl.read_parquet(tmp_path / "moved.parquet").equals(pl.read_parquet(audit))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("features", "gemma2b"), 1, "no feature cache 'gemma2b' in this store; there are: feat"),
        (("feature", "tiny", "96"), 1, "no feature 96 in this SAE, whose features are 0 to 95"),
        (("pair", "tiny", "xyz"), 1, "no pair 'xyz' in this cache"),
        (("features", "tiny", "--sort", "size"), 2, "unknown order 'size'; one of difference"),
        (("diff", "tiny", "policy/00"), 1, "no evaluation of policy/00 with features/"),
        (("label", "tiny", "3"), 2, "give FEATURE and TEXT, or --import FILE"),
    ],
)
def test_mistakes_are_told(cache, arguments, code, message):
    done = cache(*arguments)
    assert (done.code, message in done.err) == (code, True), done.err
