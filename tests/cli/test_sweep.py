"""``fpo sweep``: cells in processes of their own, shared caches, failures, one comparison."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
import yaml

from storage.catalog import list_artifacts
from storage.location import open_store
from tests.test_interrupted import wait_for_the_end_of

GRID = ("--grid", "train.method=dpo,fpo", "--grid", "train.alpha=0.1,0.5")


def policies(store: Path) -> set[str]:
    found = list_artifacts(open_store(store))
    return {info.version for info in found if info.stage == "policy" and info.state == "complete"}


@pytest.fixture(scope="module")
def two_sweeps(finished_run, tmp_path_factory):
    """One sweep started twice at the same time, on a store that has the caches and one cell."""
    folder = tmp_path_factory.mktemp("sweeps")
    shutil.copytree(finished_run.store, folder / "store")
    sweeps = []
    for number in range(2):
        command = [sys.executable, "-m", "cli.main", "sweep", str(finished_run.recipe), *GRID,
                   "--store", str(folder / "store"), "--report", str(folder / f"report{number}"),
                   "--parallel", str(1 + number)]  # fmt: skip
        sweeps.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ))
    said = [sweep.communicate(timeout=400)[1] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    return folder, said


@pytest.mark.slow
def test_two_sweeps_compute_each_cell_once(finished_run, two_sweeps):
    folder, said = two_sweeps
    assert len(policies(folder / "store")) == 3  # DPO has no alpha; one was there
    computed = [line for told in said for line in told.splitlines() if "  computed" in line]
    assert sorted(line.split("] ")[1].split()[0] for line in computed) == [
        "evaluate", "evaluate", "train", "train",
    ]  # fmt: skip
    assert "cell 3 of 3: method fpo, alpha 0.5" in said[0]


@pytest.mark.slow
def test_a_sweep_ends_in_one_comparison_of_its_cells(two_sweeps):
    folder, _ = two_sweeps
    store = open_store(folder / "store")
    for number in range(2):
        assert (folder / f"report{number}" / "compare.html").is_file()
    shown = pl.read_parquet(folder / "report0" / "data" / "table_metrics.parquet")
    shown = shown.filter(pl.col("run") != "reference")
    accuracies = {}
    for info in list_artifacts(store):
        if info.stage == "evaluation":
            artifact = store.artifact(info.stage, info.version)
            metrics = json.loads(artifact.path("metrics.json").read_text())
            (accuracy,) = (m["policy"]["value"] for m in metrics if m["key"] == "accuracy")
            accuracies[info.version] = accuracy
    found = shown.filter(pl.col("metric") == "accuracy")["value"].to_list()
    assert sorted(value for value in found) == pytest.approx(sorted(accuracies.values()))
    reports = sorted(path.parent.name for path in folder.glob("report0/*/report.html"))
    assert reports == ["method-dpo", "method-fpo-alpha-0.1", "method-fpo-alpha-0.5"]


@pytest.mark.slow
def test_a_cell_that_fails_leaves_the_others_and_is_told(fpo, finished_run, two_sweeps, tmp_path):
    folder, _ = two_sweeps
    shutil.copytree(folder / "store", tmp_path / "store")
    preset = tmp_path / "mine.yaml"
    cells = [
        {"name": "plain", "set": {}},
        {"name": "too fast", "set": {"train.lr": 1e30}},
        {"name": "dpo", "set": {"train.method": "dpo"}},
    ]
    preset.write_text(yaml.safe_dump({"title": "Mine", "cells": cells, "paper": ["see <there>"]}))
    done = fpo("sweep", finished_run.recipe, "--preset", preset, "--store", tmp_path / "store",
               "--report", tmp_path / "report")  # fmt: skip
    assert done.code == 1
    assert "1 of 3 cells failed; the same command goes on with them" in done.err
    assert "too fast: " in done.err
    page = (tmp_path / "report" / "compare.html").read_text()
    assert "Mine: 2 runs" in page
    assert "The paper: see &lt;there&gt;" in page


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_its_cells_had(finished_run, tmp_path):
    """By SIGKILL, when one cell is done and the other in mid-training; both end with it."""
    store = tmp_path / "store"
    shutil.copytree(finished_run.store, store)
    command = [
        sys.executable, "-m", "cli.main", "sweep", str(finished_run.recipe),
        "--grid", "train.alpha=0.2,0.3", "--set", "train.epochs=10",
        "--set", "resources.checkpoint_minutes=0",
        "--store", str(store), "--report", str(tmp_path / "report"),
    ]  # fmt: skip
    marked = {**os.environ, "FPO_TEST_RUN": str(store)}
    before = policies(store)
    sweep = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=marked)
    deadline = time.monotonic() + 300
    while not (
        policies(store) - before and [*store.glob("artifacts/policy/*/checkpoints/*/saved.json")]
    ):
        assert sweep.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sweep.kill()
    sweep.wait()
    wait_for_the_end_of(str(store))
    assert len(policies(store) - before) == 1
    again = subprocess.run(command, capture_output=True, text=True, env=marked)
    assert again.returncode == 0, again.stderr
    lines = [line.split("] ")[1] for line in again.stderr.splitlines() if line.startswith("[")]
    assert sum(line.startswith("train ") and "reused" in line for line in lines) == 1
    assert sum("going on from step-" in line for line in lines) == 1
    assert len(policies(store) - before) == 2
    assert (tmp_path / "report" / "compare.html").is_file()


def test_a_plan_counts_what_cells_share_once(fpo, finished_run, tmp_path):
    args = ("--store", tmp_path / "empty", "--plan", "--json")
    told = json.loads(fpo("sweep", finished_run.recipe, *GRID, *args).out)
    assert [cell["cell"] for cell in told["cells"]] == [
        "method dpo", "method fpo, alpha 0.1", "method fpo, alpha 0.5",
    ]  # fmt: skip
    assert {name.partition("/")[0] for name in told["shared"]} == {
        "pairs", "reference", "features",
    }  # fmt: skip
    assert [one["stages"] for one in told["estimates"]] == [
        ["tokenize", "reference", "features", "train", "evaluate"],
        ["train", "evaluate"],
        ["train", "evaluate"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --grid KEY.PATH=VALUE,VALUE"),
        (("--grid", "train.alhpa=1,2"), "cell alhpa 1: .*did you mean"),
        (("--preset", "table9"), "Sweeps: alpha, layers"),
        (("--preset", "methods", "--grid", "train.seed=1,2"), "or --preset NAME"),
    ],
)
def test_mistakes_are_told_before_anything_runs(fpo, finished_run, tmp_path, arguments, message):
    done = fpo("sweep", finished_run.recipe, "--store", tmp_path / "store", *arguments)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert not (tmp_path / "store" / "artifacts").exists()


def test_the_sweeps_that_come_with_the_project_are_listed(fpo, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = fpo("sweep", "--presets")
    assert shown.code == 0
    for name in ("methods", "alpha", "layers", "saes", "normalization"):
        assert name in shown.out
