"""``fpo store`` on a finished run, and whole runs on S3."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from storage.location import open_store
from tests.object_store import BUCKET
from tests.storage.places import credentials

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copied(finished_run, tmp_path):
    """The finished store, to be changed."""
    shutil.copytree(finished_run.store, tmp_path / "store")
    return finished_run._replace(store=tmp_path / "store", report=tmp_path / "report")


@pytest.fixture
def on_s3(seaweed, tmp_path, monkeypatch):
    """A store in the object store, and the environment to use it."""
    for name, value in credentials(seaweed).items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))
    return f"s3://{BUCKET}/cli-{uuid.uuid4().hex[:8]}"


def listed(fpo, store) -> dict[str, dict]:
    """``fpo store ls --json`` by artifact name, without versions."""
    result = fpo("store", "ls", "--store", store, "--json")
    assert result.code == 0, result.err
    return {info["stage"]: info for info in json.loads(result.out)}


def test_ls_and_show_speak_json(fpo, finished_run):
    found = listed(fpo, finished_run.store)
    assert set(found) == {"pairs", "reference", "features", "policy", "evaluation"}
    assert {info["state"] for info in found.values()} == {"complete"}
    assert found["features"]["refs"] == ["tiny"]
    shown = fpo("store", "show", "features", "--json", "--store", finished_run.store)
    manifest = json.loads(shown.out)["manifest"]
    assert manifest["version"] == found["features"]["version"]
    assert manifest["files"]["pooled/00000.parquet"]["sha256"]


def test_lineage_is_drawn_back_to_the_pairs_and_their_data(fpo, finished_run):
    result = fpo("store", "lineage", "evaluation", "--store", finished_run.store)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("evaluation/")
    assert "made from" in lines[0]
    for name in ("policy/", "features/", "reference/", "pairs/", "model:folder:", "train:"):
        assert any(name in line and ("├" in line or "└" in line) for line in lines), name
    assert "made into" in result.out
    below = json.loads(
        fpo("store", "lineage", "pairs", "--json", "--store", finished_run.store).out
    )["made_into"]
    users = {branch["name"].partition("/")[0] for branch in below["branches"]}
    assert users == {"reference", "features", "policy", "evaluation"}


def test_verify_names_every_damaged_file_and_repair_mends_them(fpo, copied):
    assert fpo("store", "verify", "--store", copied.store).code == 0
    found = listed(fpo, copied.store)
    artifacts = copied.store / "artifacts"
    names = {stage: f"{stage}/{info['version']}" for stage, info in found.items()}
    for file in ("reference/00002.parquet", "features/tokens/00000.parquet", "pairs/00001.parquet"):
        stage, _, inner = file.partition("/")
        path = artifacts / names[stage] / "data" / inner
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    (artifacts / names["features"] / "data" / "stats" / "00000.parquet").unlink()
    (artifacts / names["evaluation"] / "manifest.json").write_text("{}")
    latest = "0123456789abcdef"  # of a later run: repairing an older artifact leaves it so
    open_store(copied.store).set_ref("tiny", "features", latest)
    result = fpo("store", "verify", "--json", "--store", copied.store)
    assert result.code == 1
    bad = {v["name"]: v for v in json.loads(result.out)["artifacts"] if not v["ok"]}
    assert set(bad[names["features"]]["bad_files"]) == {
        "tokens/00000.parquet", "stats/00000.parquet",
    }  # fmt: skip
    assert "is no manifest" in bad[names["evaluation"]]["manifest_fault"]
    assert len(bad) == 4
    said = fpo("store", "verify", "--store", copied.store).out
    assert "4 damaged" in said
    assert "`fpo store repair` computes again" in said

    repaired = fpo("store", "repair", "--json", "--store", copied.store)
    assert repaired.code == 0, repaired.err
    done = {r["name"]: r for r in json.loads(repaired.out)}
    for stage in ("pairs", "reference", "features"):
        assert done[names[stage]]["identical"], stage
    assert open_store(copied.store).ref("tiny", "features") == latest
    open_store(copied.store).set_ref("tiny", "features", found["features"]["version"])
    assert fpo("store", "verify", "--store", copied.store).code == 0
    assert "nothing is damaged" in fpo("store", "repair", "--store", copied.store).out


def test_repair_says_why_it_cannot(fpo, copied):
    name = f"reference/{listed(fpo, copied.store)['reference']['version']}"
    shard = copied.store / "artifacts" / name / "data" / "00000.parquet"
    shard.write_bytes(b"")
    runs = copied.store / "runs"
    kept = {path: path.read_text() for path in runs.glob("*.json")}
    shutil.rmtree(runs)
    result = fpo("store", "repair", "--store", copied.store)
    assert result.code == 1
    assert f"{name}: the store has no record of a run that made it" in result.err
    runs.mkdir()
    for path, text in kept.items():
        record = json.loads(text)
        record["settings"]["model"]["attention"] = "eager"
        path.write_text(json.dumps(record))
    result = fpo("store", "repair", "--store", copied.store)
    assert result.code == 1
    assert f"{name} cannot be made again here" in result.err
    # Nothing was taken away from what is left of it.
    assert listed(fpo, copied.store)["reference"]["state"] == "corrupt"


def test_gc_is_a_dry_run_until_it_is_told_otherwise(fpo, copied):
    dry = fpo("store", "gc", "--store", copied.store)
    assert "0 artifacts" in dry.out
    shutil.rmtree(copied.store / "refs")
    shutil.rmtree(copied.store / "runs")
    options = ("--grace", "0", "--store", copied.store)
    dry = fpo("store", "gc", *options)
    assert "5 artifacts" in dry.out
    assert "fpo store gc --delete" in dry.out
    assert len(listed(fpo, copied.store)) == 5
    done = json.loads(fpo("store", "gc", "--delete", "--json", *options).out)
    assert len(done["artifacts"]) == 5
    assert listed(fpo, copied.store) == {}


def test_copy_to_s3_and_back_and_a_run_that_reuses_it(fpo, finished_run, on_s3, tmp_path):
    there = fpo("store", "copy", on_s3, "--store", finished_run.store)
    assert there.code == 0, there.err
    assert "5 artifacts are in s3://" in there.out
    back = fpo("store", "copy", tmp_path / "back", "evaluation", "--store", on_s3)
    assert back.code == 0, back.err
    assert fpo("store", "verify", "--store", tmp_path / "back").code == 0
    again = fpo("store", "copy", on_s3, "--json", "--store", finished_run.store)
    assert {one["state"] for one in json.loads(again.out)} == {"there already"}
    result = fpo("run", finished_run.recipe, "--store", on_s3, "--report", tmp_path / "report")
    assert result.code == 0
    assert result.err.count("reused") == 5
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_run_on_s3_makes_what_a_run_on_disk_makes(
    fpo, finished_run, on_s3, tmp_path, monkeypatch
):
    monkeypatch.setenv("FPO_STORE", on_s3)
    where = ("--report", tmp_path / "report")
    result = fpo("run", finished_run.recipe, *where)
    assert result.code == 0, result.err
    assert f"store {on_s3} (new)" in result.err
    ours, theirs = (
        {
            name: record
            for info in json.loads(fpo("store", "ls", "--json", "--store", store).out)
            for name, record in open_store(store)
            .artifact(info["stage"], info["version"])
            .manifest["files"]
            .items()
            # Of training times and of sampled times.
            if info["stage"] in ("pairs", "reference", "features") or name.startswith("model/")
        }
        for store in (on_s3, finished_run.store)
    )
    assert ours == theirs
    assert len(ours) > 20
    again = fpo("run", finished_run.recipe, *where)
    assert again.err.count("reused") == 5
    other = fpo("run", finished_run.recipe, *where, "--set", "train.alpha=1.0")
    assert other.err.count("reused") == 3
    verified = fpo("store", "verify")
    assert verified.code == 0, verified.out
    shutil.rmtree(tmp_path / "cache")
    assert fpo("report", finished_run.recipe, "-o", tmp_path / "again").code == 0


def test_a_recipe_names_its_store(fpo, finished_run, on_s3, seaweed, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    settings = json.loads(finished_run.recipe.read_text())
    settings["store"] = {"url": on_s3, "endpoint": seaweed.endpoint, "region": "us-east-1"}
    recipe = tmp_path / "s3.yaml"
    recipe.write_text(json.dumps(settings))
    result = fpo("run", recipe, "--only", "tokenize")
    assert result.code == 0, result.err
    assert f"store {on_s3} (new)" in result.err
    # The endpoint is that of the recipe's own store, not of one that the command names.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    elsewhere = fpo("run", recipe, "--only", "tokenize", "--store", f"{on_s3}-other")
    assert elsewhere.code == 1
    assert "at http://127.0.0.1:9 cannot be reached" in elsewhere.err
    # Where the artifacts are is no part of what they are.
    here = fpo("plan", recipe, "--store", finished_run.store)
    assert here.out.count("reuse") == 5


def test_an_s3_store_that_cannot_be_used_is_one_sentence(fpo, finished_run, on_s3, monkeypatch):
    for url, message in (
        ("s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
        ("s3://user:pass@bucket/x", "credentials belong in AWS_ACCESS_KEY_ID"),
        ("ftp://x/y", "stores are folders"),
    ):
        result = fpo("run", finished_run.recipe, "--store", url)
        assert result.code == 1
        assert result.err.startswith("error: ")
        assert message in result.err
        assert "Traceback" not in result.err


def recorded_by_prefect() -> bytes:
    """Return all that Prefect's server has on runs, tasks, their artifacts and log lines."""
    found = b""
    for kind in ("flow_runs", "task_runs", "artifacts", "logs"):
        url = f"{os.environ['PREFECT_API_URL']}/{kind}/filter"
        offset, rows = 0, [None]
        while rows:
            answer = httpx.post(url, json={"limit": 200, "offset": offset}).raise_for_status()
            rows = answer.json()
            found, offset = found + answer.content, offset + len(rows)
        assert offset, kind
    return found


@pytest.mark.slow
def test_no_credential_is_ever_written_or_shown(served, finished_run, on_s3, seaweed, tmp_path):
    """Runs that end well, that fail in a stage, that are refused; then all is searched."""
    wrong = "a-secret-that-is-not-right"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "FPO_STORE": on_s3,
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_LOGGING_TO_API_ENABLED": "true",
    }
    del environment["AWS_ENDPOINT_URL"]
    settings = json.loads(finished_run.recipe.read_text())
    settings["store"] = {"endpoint": seaweed.endpoint}
    recipe = tmp_path / "s3.yaml"
    recipe.write_text(json.dumps(settings))
    said = b""
    for code, more, changed in (
        (0, (), {}),
        (1, ("--set", "train.lr=1e30", "--set", "train.max_grad_norm=1e30",
             "--set", "train.epochs=4"), {}),
        (1, (), {"AWS_SECRET_ACCESS_KEY": wrong}),
        (1, ("--store", f"s3://me:{wrong}@{BUCKET}/x"), {}),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", "run", str(recipe), *more,
             "--report", str(tmp_path / "report")],
            cwd=ROOT, env={**environment, **changed}, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr.decode()
        said += done.stdout + done.stderr
    said += recorded_by_prefect()
    for secret in (seaweed.secret_key, seaweed.access_key, wrong):
        needle = secret.encode()
        assert needle not in said
        for place in ("prefect", "report", "cache"):
            searched = [path for path in (tmp_path / place).rglob("*") if path.is_file()]
            assert searched, place
            assert [str(path) for path in searched if needle in path.read_bytes()] == []
        client = seaweed.client()
        prefix = on_s3.removeprefix(f"s3://{BUCKET}/")
        keys = [
            item["Key"]
            for page in client.get_paginator("list_objects_v2").paginate(
                Bucket=BUCKET, Prefix=prefix
            )
            for item in page["Contents"]
        ]
        assert len(keys) > 20
        for key in keys:
            assert needle not in client.get_object(Bucket=BUCKET, Key=key)["Body"].read(), key
