"""``fpo audit`` on a finished run: what its evaluation says of the same features, and mistakes."""

import json

import polars as pl
import pytest
import yaml


@pytest.fixture
def audit(fpo, finished_run):
    def call(*arguments: object):
        return fpo("audit", finished_run.recipe, "--store", finished_run.store, *arguments)

    return call


def test_the_means_are_the_evaluations(audit, finished_run, tmp_path):
    done = audit("--parquet", tmp_path / "moved.parquet")
    assert done.code == 0, done.err
    assert "on 6 held-out pairs" in done.out
    found = pl.read_parquet(tmp_path / "moved.parquet")
    (path,) = finished_run.store.glob("artifacts/evaluation/*/data/features.parquet")
    both = pl.read_parquet(path).join(
        found.with_columns(pl.col("feature").cast(pl.Int64)), on=["feature", "side"], suffix="_here"
    )
    assert both.height == 40
    for name in ("reference", "policy"):
        assert both[f"{name}_here"].to_list() == pytest.approx(both[name].to_list(), abs=1e-5)
    assert (found["low"] <= found["change"]).all()
    assert (found["change"] <= found["high"]).all()
    assert found["q"].is_between(0, 1).all()


def test_groups_move_as_the_mean_of_their_features(audit, tmp_path):
    groups = tmp_path / "groups.yaml"
    groups.write_text(
        "train: {groups: [{name: three, features: [1, 4, 9]}, {name: one, features: [2]}]}\n"
    )
    told = json.loads(audit("--groups", groups, "--against", "three:one", "--json", "-n", 500).out)
    rows = {(row["feature"], row["side"]): row for row in told["features"]}
    for side in ("chosen", "rejected"):
        found = {row["group"]: row for row in told["groups"] if row["side"] == side}
        assert {name: row["size"] for name, row in found.items()} == {
            "three": 3, "one": 1, "three - one": 4,
        }  # fmt: skip
        three, one = (
            sum(rows[feature, side]["change"] for feature in members if (feature, side) in rows)
            / len(members)
            for members in ((1, 4, 9), (2,))
        )
        assert found["three"]["change"] == pytest.approx(three, abs=1e-9)
        assert found["three - one"]["change"] == pytest.approx(three - one, abs=1e-9)


def test_no_word_is_broken_in_a_terminal_of_80_columns(audit, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = audit("-n", 40).out.splitlines()
    (heading,) = (line for line in lines if "feature" in line and "effect" in line)
    assert heading.split() == [
        "feature", "side", "reference", "policy", "change", "effect", "q", "95", "%", "interval",
    ]  # fmt: skip
    sides = [line.split()[1] for line in lines if line.strip()[:1].isdigit()]
    assert len(sides) == 40
    assert set(sides) <= {"chosen", "rejected"}


def test_what_moved_most_becomes_a_group(audit, tmp_path):
    group = tmp_path / "moved.yaml"
    arguments = ("--sort", "change", "-n", 5, "--json")
    rows = json.loads(audit(*arguments, "--group", group, "--name", "style").out)["features"]
    sizes = [abs(row["change"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    every = json.loads(audit("-n", 500, "--json").out)["features"]
    assert sizes[0] == max(abs(row["change"]) for row in every)
    (written,) = yaml.safe_load(group.read_text())["train"]["groups"]
    assert written == {
        "name": "style", "features": sorted({row["feature"] for row in rows}), "weight": 1.0
    }  # fmt: skip
    measured = json.loads(audit("--groups", group, "--json").out)["groups"]
    assert {row["group"] for row in measured} == {"style"}


def test_mistakes_are_told(audit, fpo, finished_run, tmp_path):
    other = audit("--set", "train.alpha=3")
    assert (other.code, "is not trained yet" in other.err) == (1, True)
    groups = tmp_path / "groups.yaml"
    groups.write_text("train:\n  groups:\n  - {name: far, features: [96]}\n")
    beyond = audit("--groups", groups)
    assert "group far: feature 96 is not in this SAE, whose features are 0 to 95" in beyond.err
    alone = audit("--against", "a")
    assert "--against a: give two groups as ONE:OTHER" in alone.err
    absent = audit("--against", "a:b")
    assert "there is no group 'a'; there are: none" in absent.err
    groups.write_text("train: {groups: [{name: a, features: [1]}, {name: 2024, features: [2]}]}")
    twice = audit("--groups", groups, "--groups", groups)
    assert (twice.code, "there is a group 'a' already" in twice.err) == (2, True)
    assert "2024" in audit("--groups", groups).out
    for mistake in (("--parquet", tmp_path / "no" / "x"), ("--group", tmp_path / "no" / "x")):
        nowhere = audit(*mistake)
        assert (nowhere.code, "there is no folder" in nowhere.err) == (2, True)
    assert audit("--name", "No Good").code == 2
    groups.write_text("[]")
    none = audit("--groups", groups)
    assert "groups.yaml: no feature groups" in none.err
    missing = audit("--groups", tmp_path / "nofile.yaml")
    assert "nofile.yaml: there is no such file" in missing.err
    assert "cannot be read (Is a directory)" in audit("--groups", tmp_path).err
