"""A real Prefect server, the project's deployments on it, and real process workers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    api = PREFECT_API_URL.value()
    assert api
    quick = {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    return {**os.environ, **quick, "PREFECT_API_URL": api, "FPO_CHECKOUT": str(ROOT), **more}


def command(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment(),
    )  # fmt: skip


def prefect(*arguments: str, cwd: Path = ROOT) -> str:
    done = command("prefect", "--no-prompt", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submit(deployment: str, **parameters: Any) -> uuid.UUID:
    told = prefect("deployment", "run", deployment, "--params", json.dumps(parameters))
    found = re.search(r"UUID: (\S+)", told)
    assert found, told
    return uuid.UUID(found[1])


class Worker:
    """A process worker of a pool; what it says is in a file."""

    def __init__(self, pool: str, folder: Path) -> None:
        self.said = folder / f"{pool}.log"
        self.mark = f"{folder}/{pool}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "1"],
            cwd=folder, stdout=self.said.open("ab"), stderr=subprocess.STDOUT,
            env=environment(FPO_TEST_RUN=self.mark, PREFECT_LOGGING_LEVEL="INFO"),
        )  # fmt: skip

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def kill(self) -> None:
        """As if its host had died: the worker, its flow runs and all below them."""
        root = psutil.Process(self.process.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(60)

    def kill_runs(self) -> None:
        """Kill the flow runs and all below them, as the kernel does for memory; not the worker."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def read_run(run: uuid.UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run)


def state_of(run: uuid.UUID) -> str:
    state = read_run(run).state
    return state.type.value if state else ""


def wait_for(condition: Callable[[], Any], *said: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        logs = "\n".join(path.read_text() for path in said)
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)


def ended(run: uuid.UUID, *said: Path, seconds: float = 180) -> FlowRun:
    """A run in the state that it ended in."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    wait_for(lambda: state_of(run) in final, *said, seconds=seconds)
    return read_run(run)
