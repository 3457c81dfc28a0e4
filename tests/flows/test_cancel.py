"""A deployment that is cancelled in mid-training: real server, real process worker."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from tests.test_interrupted import children_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def prefect(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(**more: str) -> dict[str, str]:
    api = PREFECT_API_URL.value()
    assert api
    quick = {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    return {**os.environ, **quick, "PREFECT_API_URL": api, "FPO_CHECKOUT": str(ROOT), **more}


@pytest.fixture
def worker(prefect_server, tmp_path) -> Iterator[Path]:
    """A process worker of the pool that ``prefect.yaml`` names; gives the file of what it says."""
    said = tmp_path / "worker.log"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "fpo-cpu",
               "--type", "process"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=said.open("wb"), stderr=subprocess.STDOUT,
        env=environment(FPO_TEST_RUN=str(tmp_path), PREFECT_LOGGING_LEVEL="INFO"),
    )  # fmt: skip
    yield said
    process.terminate()
    process.wait(60)


def test_a_cancelled_deployment_saves_itself_and_goes_on(finished_run, worker, fpo, tmp_path):
    """In mid-training: a checkpoint in the store, no process, and the next run starts from it."""
    store = tmp_path / "store"
    shutil.copytree(finished_run.store, store)
    before = set(store.glob("runs/*.json"))
    overrides = ["train.epochs=100", "train.lr=1e-6", "resources.checkpoint_minutes=100"]
    given = {"recipe": str(finished_run.recipe), "store": str(store), "overrides": overrides}
    prefect("deploy", "--name", "quickstart")
    told = prefect("deployment", "run", "fpo-pipeline/quickstart", "--params", json.dumps(given))
    flow_run = re.search(r"UUID: (\S+)", told)
    assert flow_run
    wait_for(lambda: steps_logged(store) > 0, worker)
    prefect("flow-run", "cancel", flow_run[1])
    mark = str(tmp_path)
    wait_for(lambda: all("worker start" in line for line in children_of(mark)), worker)
    (record,) = set(store.glob("runs/*.json")) - before
    assert json.loads(record.read_text())["state"] == "preempted"
    (saved,) = store.glob("artifacts/policy/*/checkpoints/step-*/saved.json")
    wait_for(lambda: state_of(flow_run[1]) == "CANCELLED", worker)

    settings = [part for setting in overrides for part in ("--set", setting)]
    again = fpo("run", finished_run.recipe, "--store", store, "--report", tmp_path / "r", *settings)
    assert again.code == 0, again.err
    assert f"going on from {saved.parent.name}" in again.err
    assert not list(store.glob("artifacts/policy/*/checkpoints/step-*"))


def state_of(flow_run: str) -> str:
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(uuid.UUID(flow_run)).state
    return state.type.value if state else ""


def steps_logged(store: Path) -> int:
    logs = store.glob("scratch/policy-*/attempt/metrics.jsonl")
    return sum(len(log.read_bytes().splitlines()) for log in logs)


def wait_for(condition, said: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.1)
