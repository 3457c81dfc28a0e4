"""A finished artifact (read, verified) and one in the making (shard by shard, manifest last)."""

import datetime as dt
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from storage import schemas
from storage.backend import Backend
from storage.errors import ArtifactCorrupt, StoreError
from storage.parquet import check_schema, parquet_bytes

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

# Tables whose schema is part of the contract, by artifact and table name ("" is the only table).
DECLARED = {
    ("pairs", ""): schemas.PAIRS,
    ("reference", ""): schemas.REFERENCE,
    ("features", "pooled"): schemas.FEATURES_POOLED,
    ("features", "tokens"): schemas.FEATURES_TOKENS,
    ("features", "stats"): schemas.FEATURES_STATS,
    ("features", "shard_stats"): schemas.FEATURES_SHARD_STATS,
}


class Receipt(NamedTuple):
    """Proof that a shard is whole: written after its files."""

    shard: int
    rows: dict[str, int]  # by table
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256


def artifact_key(stage: str, version: str) -> str:
    """The key prefix of an artifact."""
    return f"artifacts/{stage}/{version}"


def shard_name(table: str, index: int) -> str:
    """File name of a shard, below ``data/``."""
    return f"{table}/{index:05d}.parquet" if table else f"{index:05d}.parquet"


class Artifact:
    """A committed artifact. Files are checked against the manifest when first used.

    Args:
        backend: where it is kept.
        stage: its name, such as ``pairs``.
        version: its version.
        manifest: its manifest.
    """

    def __init__(
        self, backend: Backend, stage: str, version: str, manifest: Mapping[str, Any]
    ) -> None:
        self._backend = backend
        self.stage, self.version, self.manifest = stage, version, manifest
        self._verified: set[str] = set()

    @property
    def name(self) -> str:
        """``stage/version``."""
        return f"{self.stage}/{self.version}"

    def path(self, file: str) -> Path:
        """Local path of a data file, its size and sha256 verified.

        Raises:
            ArtifactCorrupt: naming the file, what was expected and found, and the remedy.
            StoreError: the artifact has no such file.
        """
        expected = self.manifest["files"].get(file)
        if expected is None:
            raise StoreError(f"{self.name} has no file {file!r}")
        key = f"{artifact_key(self.stage, self.version)}/data/{file}"
        try:
            path = self._backend.local_path(key)
        except KeyError as error:
            raise self._corrupt(file, "it is missing") from error
        if file not in self._verified:
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise self._corrupt(file, f"it has {size} bytes, written were {expected['bytes']}")
            digest = file_sha256(path)
            if digest != expected["sha256"]:
                found, wanted = digest[:12], expected["sha256"][:12]
                raise self._corrupt(file, f"its sha256 is {found}..., written was {wanted}...")
            self._verified.add(file)
        return path

    def _corrupt(self, file: str, why: str) -> ArtifactCorrupt:
        return ArtifactCorrupt(f"{self.name} is damaged: {file}: {why}", self.stage)

    def num_shards(self, table: str = "") -> int:
        """Number of shards of a table."""
        files = self.manifest["files"]
        count = 0
        while shard_name(table, count) in files:
            count += 1
        return count

    def shard_path(self, shard: int, table: str = "") -> Path:
        """Verified local path of one shard."""
        return self.path(shard_name(table, shard))

    def table(self, table: str = "", shard: int = 0) -> pa.Table:
        """One shard as a table."""
        return pq.read_table(self.shard_path(shard, table))

    def tables(self, table: str = "") -> Iterator[pa.Table]:
        """All shards of a table, in order."""
        for shard in range(self.num_shards(table)):
            yield self.table(table, shard)

    def scan(self, table: str = "") -> pl.LazyFrame:
        """All shards of a table as one lazy polars frame."""
        return pl.scan_parquet([self.shard_path(n, table) for n in range(self.num_shards(table))])

    def folder(self, name: str) -> Path:
        """A verified local folder of data files, such as ``model``."""
        inside = [file for file in self.manifest["files"] if file.startswith(f"{name}/")]
        if not inside:
            raise StoreError(f"{self.name} has no folder {name!r}")
        paths = [self.path(file) for file in inside]
        return paths[0].parents[inside[0].count("/") - 1]


class ArtifactWriter:
    """Writes an artifact shard by shard; what an earlier attempt finished is kept.

    Args:
        backend: where it goes.
        stage: its name.
        version: its version.
        scratch: a local folder for work in progress, removed on commit.
    """

    def __init__(self, backend: Backend, stage: str, version: str, scratch: Path) -> None:
        self._backend, self._scratch = backend, scratch
        self.stage, self.version = stage, version
        self._key = artifact_key(stage, version)
        self._files: dict[str, dict[str, Any]] = {}

    def finished_shards(self) -> dict[int, Receipt]:
        """The shards that are whole, by index; one whose file is gone or changed is not."""
        found = {}
        for entry in self._backend.list(f"{self._key}/parts/"):
            try:
                receipt = Receipt(**json.loads(self._backend.read(entry.key)))
            except (json.JSONDecodeError, TypeError, KeyError):
                continue
            if all(self._intact(name, file["sha256"]) for name, file in receipt.files.items()):
                found[receipt.shard] = receipt
        return found

    def _intact(self, name: str, sha256: str) -> bool:
        try:
            return file_sha256(self._backend.local_path(f"{self._key}/data/{name}")) == sha256
        except KeyError:
            return False

    def put_shard(self, index: int, tables: Mapping[str, pa.Table]) -> Receipt:
        """Write one shard of each table, then its receipt.

        Raises:
            StoreError: a table is not of its declared schema.
        """
        rows, files = {}, {}
        for table, content in tables.items():
            name = shard_name(table, index)
            files[name] = self._put_bytes(name, self._encode(table, content))
            rows[table] = content.num_rows
        receipt = Receipt(index, rows, files)
        self._backend.put(f"{self._key}/parts/{index:05d}.json", _json(receipt._asdict()))
        return receipt

    def _encode(self, table: str, content: pa.Table) -> bytes:
        declared = DECLARED.get((self.stage, table))
        if declared is not None:
            check_schema(content, declared)
        return parquet_bytes(content)

    def read_table(self, table: str, index: int) -> pa.Table:
        """Read back a shard that is finished."""
        return pq.read_table(
            self._backend.local_path(f"{self._key}/data/{shard_name(table, index)}")
        )

    def put_table(self, table: str, content: pa.Table) -> None:
        """Write a table that is not sharded, as its shard 0."""
        self.put_bytes(shard_name(table, 0), self._encode(table, content))

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write a data file."""
        self._files[name] = self._put_bytes(name, data)

    def put_file(self, name: str, path: Path) -> None:
        """Write a data file from a local one."""
        self._files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        self._backend.put_file(f"{self._key}/data/{name}", path)

    def _put_bytes(self, name: str, data: bytes) -> dict[str, Any]:
        self._backend.put(f"{self._key}/data/{name}", data)
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    @contextmanager
    def only_one(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other runs on this machine from writing the same artifact; a crash releases it.

        Args:
            on_wait: called when another run has it and this one begins to wait.
        """
        import fcntl

        self._scratch.parent.mkdir(parents=True, exist_ok=True)
        with self._scratch.with_name(f"{self._scratch.name}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def scratch(self) -> Path:
        """A local folder for work in progress; what a killed run left in it is still there."""
        self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch

    def commit(
        self,
        *,
        inputs: Mapping[str, str],
        recipe: Mapping[str, Any],
        stats: Mapping[str, Any],
        seconds: float,
        provenance: Mapping[str, Any],
    ) -> Artifact:
        """Write the manifest: from here on the artifact exists.

        A writer that lost a race against another gets the other's artifact, which is the same.
        """
        receipts = self.finished_shards()
        if sorted(receipts) != list(range(len(receipts))):
            raise StoreError(f"{self.stage}/{self.version}: shards {sorted(receipts)} have gaps")
        files = dict(self._files)
        rows: dict[str, int] = {}
        for receipt in receipts.values():
            files |= receipt.files
            for table, count in receipt.rows.items():
                rows[table] = rows.get(table, 0) + count
        manifest = {
            "format": "fpo-artifact",
            "format_version": FORMAT_VERSION,
            "stage": self.stage,
            "version": self.version,
            "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "inputs": dict(inputs),
            "recipe": dict(recipe),
            "rows": next(iter(rows.values()), None),
            "rows_by_table": rows,
            "bytes": sum(file["bytes"] for file in files.values()),
            "files": dict(sorted(files.items())),
            "stats": dict(stats),
            "seconds": round(seconds, 3),
            "provenance": dict(provenance),
        }
        key = f"{self._key}/{MANIFEST}"
        if not self._backend.create(key, _json(manifest)):
            manifest = json.loads(self._backend.read(key))
        shutil.rmtree(self._scratch, ignore_errors=True)
        return Artifact(self._backend, self.stage, self.version, manifest)


def file_sha256(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False, default=str) + "\n").encode()
