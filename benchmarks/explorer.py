"""How fast `fpo browse` is on a large cache, and in how much memory.

    python -m benchmarks.explorer
    python -m benchmarks.explorer --responses 100000 --store DIR

Writes the feature cache of `benchmarks.scale` and pairs to it into a store in a temporary folder
(or DIR, where a finished one is used again), starts `fpo browse` on it as people do, and asks for
pages: each first by a server just started, with the system's file cache emptied of the store
(cold), then for others of its kind (warm). Then the same on SeaweedFS, with an empty read cache.
The indexes are made once for an artifact; what that takes is told apart. Prints a Markdown table.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa

from benchmarks.faults.seaweed import SeaweedFS
from benchmarks.scale import D_SAE, OF, PAIRS_VERSION, VERSION, VOCABULARY
from storage import schemas
from storage.artifact import Artifact
from storage.catalog import find_artifact
from storage.copy import copy_artifact
from storage.location import open_store
from storage.manifest import Made
from storage.store import Store

BUCKET, WARM, PROMPT, TIMEOUT = "fpo-benchmark", 20, 40, 600
Page = Callable[[int], str]  # the URL of one of its kind, by a number


def main() -> None:
    """Make the store, and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--responses", type=int, default=1_000_000)
    parser.add_argument("--store", type=Path, help="kept there; a temporary folder without it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fpo-explorer-") as name:
        folder = Path(name)
        url = str(options.store or folder / "store")
        ids = _make(open_store(url), url, options.responses)
        print("| | start-up, s | page | cold, s | warm, median s | slowest s | peak RSS, MB |")
        print("|---|---|---|---|---|---|---|")
        _measure("folder", url, folder / "cache", ids, lambda: _forget(Path(url)))
        with SeaweedFS(folder / "server") as server:
            server.create_bucket(BUCKET)
            os.environ |= {
                "AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key,
                "AWS_ENDPOINT_URL": server.endpoint, "FPO_CACHE": str(folder / "writing"),
            }  # fmt: skip
            bucket = f"s3://{BUCKET}/store"
            source, target = open_store(url), open_store(bucket)
            for name in (f"pairs/{PAIRS_VERSION}", f"features/{VERSION}"):
                copy_artifact(source, target, find_artifact(source, name), lambda _: None)
            _measure("SeaweedFS", bucket, folder / "s3-cache", ids, lambda: None)


def _make(store: Store, url: str, responses: int) -> list[str]:
    """The artifacts, where they are not there; ids of some pairs."""
    for part in ("write", "merge"):
        if store.state("features", VERSION) != "complete":
            command = [sys.executable, "-m", "benchmarks.scale", "--part", part, url]
            command += ["--responses", str(responses)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    features = store.artifact("features", VERSION)
    if store.state("pairs", PAIRS_VERSION) != "complete":
        _write_pairs(store, features)
    shards = np.linspace(0, features.num_shards("pooled") - 1, WARM + 1).astype(int)
    found = [features.rows("pooled", int(one), slice(0, 1), ["pair_id"]) for one in shards]
    return [table["pair_id"][0].as_py() for table in found]


def _write_pairs(store: Store, features: Artifact) -> None:
    """Responses of the lengths that the features have, of any tokens."""
    rng = np.random.default_rng(0)
    with store.hold("pairs", PAIRS_VERSION, None) as hold:
        assert hold is not None
        writer = store.writer("pairs", PAIRS_VERSION, hold)
        for shard in range(features.num_shards("pooled")):
            table = features.rows("pooled", shard, None, ["pair_id", "n_tokens"])
            ids, lengths = table["pair_id"][::2], table["n_tokens"].to_pylist()
            sizes = {"prompt_ids": [PROMPT] * len(ids), "chosen_ids": lengths[::2],
                     "rejected_ids": lengths[1::2]}  # fmt: skip
            tokens = {
                name: [rng.integers(VOCABULARY, size=size) for size in of_each]
                for name, of_each in sizes.items()
            }
            others = {"split": ["train"] * len(ids), "source": ["benchmark"] * len(ids)}
            columns = {"pair_id": ids, **tokens, **others}
            writer.put_shard(shard, {"": pa.table(columns, schema=schemas.PAIRS)})
        writer.commit(Made(0, {}, OF, {}, 0.0, {}))


def _measure(where: str, url: str, cache: Path, ids: list[str], forget: Callable[[], None]) -> None:
    """Rows of the table: the indexes made once, then each kind of page."""
    with _browsing(url, cache) as (address, started, process):
        _until(f"{address}/cache/{VERSION}/pair/{ids[0]}", "Features in which they differ")
        pairs = time.monotonic() - started
        _until(f"{address}/cache/{VERSION}/feature/0/distribution", "<img")
        features = time.monotonic() - started
        peak = _peak(process)
    made = f"indexes, made once: pairs {pairs:.1f} s, features {features:.1f} s"
    print(f"| {where} | | {made} | | | | {peak:.0f} |", flush=True)
    for name, page in _pages(ids).items():
        shutil.rmtree(cache / "store-files", ignore_errors=True)
        forget()
        asked = time.monotonic()
        with _browsing(url, cache) as (address, started, process):
            cold = _seconds(address + page(0))
            warm = [_seconds(address + page(number)) for number in range(1, WARM + 1)]
            print(f"| {where} | {started - asked:.2f} | {name} | {cold:.2f} | "
                  f"{statistics.median(warm):.3f} | {max(warm):.3f} | {_peak(process):.0f} |",
                  flush=True)  # fmt: skip


def _pages(ids: list[str]) -> dict[str, Page]:
    root = f"/cache/{VERSION}"
    # Of the densest features and of the rarest.
    features = np.random.default_rng(0).permutation(D_SAE)[: WARM + 1]
    features[::2] = np.arange(len(features[::2]))
    return {
        "all artifacts": lambda _: "/",
        "an artifact": lambda _: f"/artifact/features/{VERSION}",
        "features": lambda n: (
            f"{root}?sort={('difference', 'density', 'max')[n % 3]}&offset={50 * n}"
        ),
        "a feature": lambda n: f"{root}/feature/{features[n]}",
        "its histogram": lambda n: f"{root}/feature/{features[n]}/histogram.svg",
        "pairs": lambda n: f"{root}/pairs?offset={1000 * n}",
        "a pair": lambda n: f"{root}/pair/{ids[n]}",
        "a pair by a feature": lambda n: f"{root}/pair/{ids[n]}?feature={features[n]}",
    }


@contextmanager
def _browsing(url: str, cache: Path) -> Iterator[tuple[str, float, psutil.Process]]:
    """A server: its address, when it first answered, and its process."""
    command = [sys.executable, "-m", "cli.main", "browse", url, "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "FPO_CACHE": str(cache)}
    ) as server:
        assert server.stderr is not None
        lines = iter(server.stderr)
        address = next(
            found[0] for line in lines if (found := re.search(r"http://\S+(?=/ )", line))
        )
        _seconds(address + "/static/style.css")
        try:
            yield address, time.monotonic(), psutil.Process(server.pid)
        finally:
            server.terminate()
            server.communicate(timeout=30)


def _until(url: str, there: str) -> None:
    """Until a page shows what it waits for an index for."""
    while there not in httpx.get(url, timeout=TIMEOUT).text:
        time.sleep(0.1)


def _seconds(url: str) -> float:
    started = time.perf_counter()
    httpx.get(url, timeout=TIMEOUT).raise_for_status()
    return time.perf_counter() - started


def _forget(folder: Path) -> None:
    """Have the system read the files from the disk again."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _peak(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1000


if __name__ == "__main__":
    main()
