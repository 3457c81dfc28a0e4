"""Speed and memory of the store, beside the plain client doing the same bytes.

    python -m benchmarks.store [--rounds 5] [--gigabytes 1]

Starts SeaweedFS on this machine, and prints a Markdown table: upload and download of 64 MB shards
as ratios to boto3's own transfer manager (its defaults), interleaved in one process, each first in
turn, medians; the peak memory of a process that uploads one large file; and the listing of 10,000
artifacts in a folder. On a slow disk the disk is all that is measured: TMPDIR=/dev/shm.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.seaweed import SeaweedFS
from storage.artifact import Artifact
from storage.backend import FileRecord
from storage.catalog import list_artifacts
from storage.location import open_store
from storage.manifest import Made, make_manifest
from storage.version import artifact_version

BUCKET, SHARD_BYTES, ARTIFACTS = "fpo-benchmark", 64 << 20, 10_000
STAGE, VERSION = "policy", "0123456789abcdef"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--upload", metavar="ENDPOINT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = int(options.gigabytes * 2**30)
    if options.upload:
        _upload_one(size)
        return
    print("| | median | smallest | largest |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, SeaweedFS(Path(name) / "server") as server:
        server.create_bucket(BUCKET)
        os.environ.update(_environment(server, Path(name)))
        _transfer(Path(name), server, options.rounds, size)
        _memory(options.gigabytes)
    _listing(options.rounds)


def _environment(server: SeaweedFS, folder: Path) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_ENDPOINT_URL": server.endpoint,
        "FPO_CACHE": str(folder / "cache"),
    }


class Round:
    """The same bytes up and down, by the plain client and by ours, under keys of their own.

    Args:
        folder: with the files to send.
        names: of the files.
        plain: the plain client.
    """

    def __init__(self, folder: Path, names: list[str], plain: Any) -> None:
        self.folder, self.names, self.plain = folder, names, plain
        self.mark = uuid.uuid4().hex[:8]
        self.store = open_store(f"s3://{BUCKET}/ours-{self.mark}")
        self.records: dict[str, FileRecord] = {}
        for name in names:
            os.link(folder / name, self._link(name))  # the store takes its files away

    def _link(self, name: str) -> Path:
        return self.folder / f"link-{name}"

    def up_plain(self) -> None:
        for name in self.names:
            self.plain.upload_file(str(self.folder / name), BUCKET, f"plain-{self.mark}/{name}")

    def up_ours(self) -> None:
        for name in self.names:
            key = f"artifacts/{STAGE}/{VERSION}/data/{name}"
            self.records[name] = self.store.backend.put_file(key, self._link(name))

    def down_plain(self) -> None:
        for name in self.names:
            target = str(self.folder / f"got-{name}")
            self.plain.download_file(BUCKET, f"plain-{self.mark}/{name}", target)

    def down_ours(self) -> None:
        made = Made(1, {}, {}, {}, 0.0, {})
        manifest = make_manifest(STAGE, VERSION, made, self.records, {})
        Artifact(self.store.backend, STAGE, VERSION, manifest).paths(self.names)


def _transfer(folder: Path, server: SeaweedFS, rounds: int, size: int) -> None:
    names = [f"{number:05d}.parquet" for number in range(max(1, size // SHARD_BYTES))]
    for name in names:
        (folder / name).write_bytes(os.urandom(SHARD_BYTES))
    plain = server.client()
    ratios: dict[str, list[float]] = {"upload": [], "download": []}
    for number in range(rounds):
        one, plain_first = Round(folder, names, plain), number % 2 == 0
        ratios["upload"].append(_speed_up(one.up_plain, one.up_ours, plain_first=plain_first))
        ratios["download"].append(_speed_up(one.down_plain, one.down_ours, plain_first=plain_first))
        _clean(folder, server)
    for what, found in ratios.items():
        _row(f"{what} of {len(names)} x 64 MB, speed beside boto3's", found)


def _speed_up(
    plain: Callable[[], object], ours: Callable[[], object], *, plain_first: bool
) -> float:
    """Time of the plain client over ours, each first in turn."""
    if plain_first:
        seconds = _seconds(plain)
        return seconds / _seconds(ours)
    seconds = _seconds(ours)
    return _seconds(plain) / seconds


def _clean(folder: Path, server: SeaweedFS) -> None:
    """Room for the next round."""
    client = server.client()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
    for path in (*folder.glob("cache/store-files/files/??/*"), *folder.glob("got-*")):
        path.unlink()


def _memory(gigabytes: float) -> None:
    command = [sys.executable, "-m", "benchmarks.store", "--upload", "yes"]
    command += ["--gigabytes", str(gigabytes)]
    peaks = []
    for _ in range(3):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks.append(float(done.stdout))
    _row(f"peak memory of a process uploading one file of {gigabytes:g} GB, MB", peaks)


def _upload_one(size: int) -> None:
    store = open_store(f"s3://{BUCKET}/memory-{uuid.uuid4().hex[:8]}")
    store.backend.scratch.mkdir(parents=True, exist_ok=True)
    path = store.backend.scratch / "large"
    with path.open("wb") as stream:
        for _ in range(size >> 20):
            stream.write(os.urandom(1 << 20))
    store.backend.put_file("large", path)
    # Not getrusage's peak, which a process has from the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000)


def _listing(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = open_store(name)
        for number in range(ARTIFACTS):
            recipe, inputs = {"number": number}, {"pairs": VERSION}
            version = artifact_version(
                stage="reference", schema_version=1, recipe=recipe, inputs=inputs
            )
            folder = Path(name) / "artifacts" / "reference" / version
            made = Made(1, recipe, inputs, {"tokens": 1}, 1.0, {"python": "3"})
            (folder / "data").mkdir(parents=True)
            (folder / "parts").mkdir()
            (folder / "data" / "00000.parquet").write_bytes(b"PAR1")
            (folder / "parts" / "00000.json").write_bytes(b"{}")
            records = {"00000.parquet": FileRecord(4, hashlib.sha256(b"PAR1").hexdigest())}
            manifest = make_manifest("reference", version, made, records, {"": 1})
            (folder / "manifest.json").write_text(json.dumps(manifest))
        seconds = [_seconds(lambda: list_artifacts(store)) for _ in range(rounds)]
        assert len(list_artifacts(store)) == ARTIFACTS
        _row(f"listing {ARTIFACTS:,} artifacts in a folder, seconds", seconds)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _row(what: str, values: list[float]) -> None:
    low, high = min(values), max(values)
    print(f"| {what} | {statistics.median(values):.2f} | {low:.2f} | {high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
