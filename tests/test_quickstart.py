"""The quickstart's own model, SAE and data, with few pairs so that it takes a minute or two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from storage.cache import cache_folder
from storage.catalog import list_artifacts
from storage.location import open_store
from tests.object_store import BUCKET
from tests.storage.places import credentials

pytestmark = pytest.mark.slow
FEW = (
    "--set", "data.limit=16", "--set", "evaluation.prompts=2",
    "--set", "evaluation.max_new_tokens=24",
)  # fmt: skip


def test_the_quickstart_on_few_pairs(fpo, tmp_path):
    where = ("--store", tmp_path / "store", "--report", tmp_path / "report")
    planned = json.loads(fpo("plan", "quickstart", *FEW, *where[:2], "--json").out)
    result = fpo("run", "quickstart", *FEW, *where)
    assert result.code == 0, result.err
    store = open_store(tmp_path / "store")
    found = {info.stage: store.artifact(info.stage, info.version) for info in list_artifacts(store)}
    steps = pl.read_parquet(found["policy"].path("metrics.parquet"))
    # The invariant, on a real model and real caches: u = 0, D = 0 and loss = log 2.
    assert steps["loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert steps["discrepancy_chosen"][0] < 1e-9
    assert abs(steps["margin"][0]) < 1e-5
    assert steps["loss"][1] < steps["loss"][0]
    assert steps["missing"].max() == 0
    metrics = {
        m["key"]: m for m in json.loads(found["evaluation"].path("metrics.json").read_text())
    }
    assert metrics["reward_accuracy"]["policy"]["value"] > 0.6
    assert metrics["margin"]["difference"]["value"] > 0
    answers = pl.read_parquet(found["evaluation"].path("answers.parquet"))
    assert answers["before"].str.len_chars().min() > 10
    assert "system" not in answers["prompt"][0]
    assert (tmp_path / "report" / "report.html").is_file()
    again = fpo("run", "quickstart", *FEW, *where)
    assert again.err.count("reused") == 5
    # What was said before anything ran, from the files alone. Small shards have large footers.
    said = {stage["stage"]: stage for stage in planned["estimates"]["stages"]}
    assert said["reference"]["tokens"] == pytest.approx(
        found["pairs"].manifest["stats"]["tokens"], rel=0.35
    )
    assert said["features"]["bytes"] == pytest.approx(found["features"].manifest["bytes"], rel=0.5)
    assert said["train"]["bytes"] == pytest.approx(found["policy"].manifest["bytes"], rel=0.02)


def test_the_quickstart_on_s3(fpo, seaweed, tmp_path, monkeypatch):
    """With the environment alone, as the README says; its model goes up and comes back."""
    for name, value in credentials(seaweed).items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("FPO_STORE", f"s3://{BUCKET}/quickstart")
    # The model that was converted on first use stays where it is: only the read cache is new.
    models = cache_folder() / "models"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "models").symlink_to(models)
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))
    few = ("--set", "data.limit=4", "--set", "evaluation.prompts=1",
           "--set", "evaluation.max_new_tokens=8")  # fmt: skip
    result = fpo("run", "quickstart", *few, "--report", tmp_path / "report")
    assert result.code == 0, result.err
    assert result.err.count("computed") == 5
    assert (tmp_path / "report" / "report.html").is_file()
    again = fpo("run", "quickstart", *few, "--report", tmp_path / "report")
    assert again.err.count("reused") == 5
    verified = fpo("store", "verify")
    assert verified.code == 0
    assert "5 artifacts" in verified.out
    drawn = fpo("store", "lineage", "evaluation").out
    assert "policy/" in drawn
    assert "pairs/" in drawn


def test_the_readmes_polars_lines_run_on_its_store(tmp_path, finished_run):
    """The lines as the README has them, on a store of another run."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(part for part in readme.split("```python\n") if "scan_parquet" in part)
    lines = block.partition("```")[0].strip().splitlines()
    assert len(lines) == 3
    (tmp_path / "fpo-store").symlink_to(finished_run.store)
    shown = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "POLARS_FMT_MAX_COLS": "-1", "POLARS_TABLE_WIDTH": "300"}, check=True,
    ).stdout  # fmt: skip
    for column in ("feature", "density", "mean_chosen", "mean_rejected", "gap"):
        assert column in shown
    assert "shape: (5, 8)" in shown
