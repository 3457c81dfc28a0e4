"""Runs from a terminal: plain calls without a server, Prefect's temporary server with Ray."""

import os
import signal
import subprocess
import sys

import pytest

from tests.test_interrupted import ROOT, children_of, wait_for_the_end_of

ON_A_TEMPORARY_SERVER = """
import time
from prefect import flow
from flows.local import contained_prefect_server

@flow
def sleeps():
    print("running", flush=True)
    time.sleep(300)

with contained_prefect_server():
    sleeps()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_temporary_server_ends_with_its_run(tmp_path, how):
    """Ctrl-C reaches the whole process group; the server outlives that until the run has ended."""
    mark = str(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TEMPORARY_SERVER],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={
            **os.environ,
            "FPO_TEST_RUN": mark,
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        },
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    assert any("uvicorn" in line for line in children_of(mark))
    os.killpg(process.pid, how)
    process.communicate(timeout=180)
    wait_for_the_end_of(mark)
