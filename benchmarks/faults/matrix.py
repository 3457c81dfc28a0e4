"""Faults and what became of the store: one row a fault, with a real object store and real kills.

Each row runs the workload in processes of its own, under one fault, again and again until it ends
well, and looks at the store past our own code after every end: whatever has a manifest must be
whole, to the byte what it is without faults, and nothing must be left over.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults import workload
from benchmarks.faults.chance import FAULTS
from benchmarks.faults.proxy import FaultyProxy
from benchmarks.faults.seaweed import SeaweedFS

BUCKET = "fpo-faults"
MAX_RUNS = 60
ARTIFACT = f"artifacts/{workload.STAGE}/{workload.VERSION}"
_ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """What one fault did."""

    place: str  # folder or S3
    fault: str
    injected: int
    runs: int  # until one ended well; the kills not counted
    torn: int  # times that a manifest stood on anything but the whole artifact: must be 0
    identical: bool  # the files are those that are made without faults
    left_over: tuple[str, ...]  # keys, uploads and leases that should not be there
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the store kept its promise."""
        return self.torn == 0 and self.identical and not self.left_over


class Site:
    """A place for a store, looked at past our own code.

    Args:
        url: of the store.
        objects: reads every object: key -> bytes.
        uploads: counts unfinished uploads.
        environment: what the workload's process needs to reach it.
        endpoint: of S3.
    """

    def __init__(
        self,
        url: str,
        objects: Callable[[], Mapping[str, bytes]],
        uploads: Callable[[], int],
        environment: Mapping[str, str],
        endpoint: str = "",
    ) -> None:
        self.url, self.objects, self.uploads = url, objects, uploads
        self.environment, self.endpoint = environment, endpoint

    def start(self, endpoint: str = "") -> subprocess.Popen[bytes]:
        """Start the workload; it runs when this returns."""
        command = [sys.executable, "-m", "benchmarks.faults.workload", self.url]
        command += [endpoint or self.endpoint] if self.endpoint else []
        process = subprocess.Popen(
            command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **self.environment},
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        return process

    def is_torn(self) -> bool:
        """Whether there is a manifest on anything but a whole artifact."""
        found = self.objects()
        if f"{ARTIFACT}/manifest.json" not in found:
            return False
        manifest = json.loads(found[f"{ARTIFACT}/manifest.json"])
        return any(
            hashlib.sha256(found.get(f"{ARTIFACT}/data/{name}", b"")).hexdigest() != file["sha256"]
            for name, file in manifest["files"].items()
        )

    def contents(self) -> dict[str, str]:
        """sha256 of every data file and receipt of the artifact."""
        return {
            key: hashlib.sha256(data).hexdigest()
            for key, data in self.objects().items()
            if key.startswith((f"{ARTIFACT}/data/", f"{ARTIFACT}/parts/"))
        }

    def left_over(self, expected: Mapping[str, str]) -> tuple[str, ...]:
        """Keys that a run without faults does not leave, and unfinished uploads."""
        known = {*expected, f"{ARTIFACT}/manifest.json", f"refs/faults/{workload.STAGE}.json"}
        extra = sorted(set(self.objects()) - known)
        uploads = self.uploads()
        return (*extra, *([f"{uploads} unfinished uploads"] if uploads else ()))


class Sites:
    """Makes fresh sites, on a folder and in a bucket; knows what the workload makes undisturbed."""

    def __init__(self, folder: Path, server: SeaweedFS) -> None:
        self._folder, self.server = folder, server
        self._count = 0
        server.create_bucket(BUCKET)
        self.expected: dict[str, str] = {}
        undisturbed = self.in_folder()
        until_done(undisturbed)
        self.expected = undisturbed.contents()

    def in_folder(self, folder: Path | None = None) -> Site:
        """A fresh store in a folder."""
        root = folder or self._fresh() / "store"

        def objects() -> dict[str, bytes]:
            every = (p for p in root.rglob("*") if p.is_file())
            keys = {p.relative_to(root).as_posix(): p.read_bytes() for p in every}
            return {k: v for k, v in keys.items() if not k.endswith("/.lock")}

        return Site(str(root), objects, lambda: 0, {})

    def in_bucket(self) -> Site:
        """A fresh store below a prefix of the bucket, with a read cache of its own."""
        cache = self._fresh() / "cache"
        prefix = cache.parent.name
        environment = {
            "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
            "FPO_CACHE": str(cache),
        }
        client = self.server.client()

        def objects() -> dict[str, bytes]:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=BUCKET, Prefix=f"{prefix}/"
            )
            keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
            return {key.removeprefix(f"{prefix}/"): _read(client, key) for key in keys}

        def uploads() -> int:
            found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/")
            return len(found.get("Uploads", ()))

        url = f"s3://{BUCKET}/{prefix}"
        return Site(url, objects, uploads, environment, self.server.endpoint)

    def _fresh(self) -> Path:
        self._count += 1
        folder = self._folder / f"site-{self._count:03d}"
        folder.mkdir()
        return folder

    def row(
        self, site: Site, fault: str, disturb: Callable[[], tuple[int, int, int]]
    ) -> Row:  # fmt: skip
        """Disturb a site, then judge it.

        Args:
            site: the place.
            fault: its name in the table.
            disturb: runs the workload under the fault until it ends well; returns how often the
                fault came, the runs and the torn states it saw.
        """
        started = time.monotonic()
        injected, runs, torn = disturb()
        return Row(
            "S3" if site.endpoint else "folder", fault, injected, runs, torn + site.is_torn(),
            site.contents() == self.expected, site.left_over(self.expected),
            time.monotonic() - started,
        )  # fmt: skip


def until_done(site: Site, endpoint: str = "") -> tuple[int, int]:
    """Run the workload until it ends well; how many runs that took, and torn states seen.

    Raises:
        RuntimeError: it never does, with what it said last.
    """
    torn, said = 0, b""
    for runs in range(1, MAX_RUNS + 1):
        process = site.start(endpoint)
        said, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            return runs, torn
        if b"Traceback" in said:
            raise RuntimeError(f"the workload broke: {said.decode()}")
        torn += site.is_torn()
    raise RuntimeError(f"{MAX_RUNS} runs, and none ended well; the last said: {said.decode()}")


def under_proxy(sites: Sites, faults: Mapping[str, float], name: str, seed: int) -> Row:
    """Faults between the client and the object store, for as long as the workload takes."""
    site = sites.in_bucket()

    def disturb() -> tuple[int, int, int]:
        host_port = ("127.0.0.1", sites.server.port)
        with FaultyProxy(*host_port, faults, seed=seed, stall_seconds=3.0) as proxy:
            runs, torn = until_done(site, proxy.endpoint)
            return proxy.counts.total(), runs, torn

    return sites.row(site, name, disturb)


def killed_writer(sites: Sites, kills: int, seed: int, *, in_bucket: bool) -> Row:
    """SIGKILL to the writer at random moments; when it got done before, a fresh store."""
    draw = random.Random(seed)  # noqa: S311 - moments, not secrets
    make = sites.in_bucket if in_bucket else sites.in_folder
    site = make()
    started = time.monotonic()
    until_done(make())
    usual = time.monotonic() - started

    def disturb() -> tuple[int, int, int]:
        nonlocal site
        killed = torn = runs = 0
        while killed < kills:
            process = site.start()
            time.sleep(draw.uniform(0, 0.8 * usual))
            if process.poll() is None:
                process.kill()
                process.wait()
                killed += 1
                torn += site.is_torn()
            elif killed < kills:
                runs += 1
                if site.contents() != sites.expected or site.left_over(sites.expected):
                    torn += 1
                site = make()
        last, more = until_done(site)
        return killed, runs + last, torn + more

    row = sites.row(site, "writer killed (SIGKILL)", disturb)
    return row._replace(
        identical=site.contents() == sites.expected, left_over=site.left_over(sites.expected)
    )


def restarted_server(sites: Sites, times: int, seed: int) -> Row:
    """SIGKILL to the object store in the middle of the run, started again some seconds later."""
    draw = random.Random(seed)  # noqa: S311 - moments, not secrets
    site = sites.in_bucket()

    def disturb() -> tuple[int, int, int]:
        process = site.start()
        for _ in range(times):
            time.sleep(draw.uniform(0.2, 0.6))
            sites.server.kill()
            time.sleep(1.0)
            sites.server.start()
        said, _ = process.communicate(timeout=600)
        torn = site.is_torn()
        if process.returncode == 0:
            return times, 1, torn
        if b"Traceback" in said:
            raise RuntimeError(f"the workload broke: {said.decode()}")
        runs, more = until_done(site)
        return times, 1 + runs, torn + more

    return sites.row(site, "object store killed and restarted", disturb)


def full_disk(sites: Sites) -> Row | None:
    """A disk that fills up while the artifact is written, and is freed later. Takes root."""
    if os.geteuid() != 0:
        return None
    with tempfile.TemporaryDirectory() as mount, _small_disk(Path(mount)) as disk:
        site = sites.in_folder(disk / "store")
        filler = disk / "filler"

        def disturb() -> tuple[int, int, int]:
            refused = torn = 0
            # Less and less in the way: it fails at another place each time.
            for megabytes in (31, 28, 22, 14, 8):
                filler.write_bytes(bytes(megabytes << 20))
                process = site.start()
                said, _ = process.communicate(timeout=600)
                if process.returncode != 0 and b"no space left" not in said:
                    raise RuntimeError(f"not said as what it is: {said.decode()}")
                refused += process.returncode != 0
                torn += site.is_torn()
                filler.unlink()
            runs, more = until_done(site)
            return refused, runs, torn + more

        return sites.row(site, "disk full", disturb)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)  # noqa: S607
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)  # noqa: S607


def two_at_once(sites: Sites, *, in_bucket: bool) -> Row:
    """Two runs of the same recipe at the same time: both succeed."""
    site = sites.in_bucket() if in_bucket else sites.in_folder()

    def disturb() -> tuple[int, int, int]:
        both = [site.start() for _ in range(2)]
        said = [process.communicate(timeout=600)[0] for process in both]
        if any(process.returncode for process in both):
            raise RuntimeError(f"not both ended well: {b'; '.join(said).decode()}")
        return 1, 2, site.is_torn()

    return sites.row(site, "two runs at once", disturb)


def run_matrix(
    folder: Path, *, probability: float, kills: int, seed: int = 0,
    on_row: Callable[[Row], None] = lambda _row: None,
) -> list[Row]:  # fmt: skip
    """All rows.

    Args:
        folder: for the stores and the server's data.
        probability: of a fault for one request.
        kills: of the writer, on each of the two places.
        seed: of what is drawn.
        on_row: told each row when it is there.
    """
    rows: list[Row] = []

    def add(row: Row | None) -> None:
        if row is not None:
            rows.append(row)
            on_row(row)

    with SeaweedFS(folder / "server") as server:
        sites = Sites(folder, server)
        for number, fault in enumerate(FAULTS):
            add(under_proxy(sites, {fault: probability}, fault, seed + number))
        mixed = {fault: 1.5 * probability / len(FAULTS) for fault in FAULTS}
        add(under_proxy(sites, mixed, "all of them mixed", seed))
        add(restarted_server(sites, 2, seed))
        for in_bucket in (True, False):
            add(killed_writer(sites, kills, seed, in_bucket=in_bucket))
            add(two_at_once(sites, in_bucket=in_bucket))
        add(full_disk(sites))
    return rows


def _read(client: Any, key: str) -> bytes:
    return client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
