"""An artifact in the making: shard by shard, each with a receipt; the manifest last."""

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from storage import schemas
from storage.artifact import Artifact, artifact_key, shard_name
from storage.backend import (
    Backend,
    BytesDone,
    FileRecord,
    Hold,
    in_parallel,
    not_shown,
)
from storage.checkpoints import Checkpoints
from storage.errors import StoreError
from storage.local import explained
from storage.manifest import MANIFEST, Made, json_bytes, make_manifest, read_manifest
from storage.parquet import check_schema, write_parquet

# Tables whose schema is part of the contract, by artifact and table name ("" is the only table).
DECLARED = {
    ("pairs", ""): schemas.PAIRS,
    ("instructions", ""): schemas.PAIRS,
    ("reference", ""): schemas.REFERENCE,
    ("features", "pooled"): schemas.FEATURES_POOLED,
    ("features", "tokens"): schemas.FEATURES_TOKENS,
    ("features", "stats"): schemas.FEATURES_STATS,
    ("features", "shard_stats"): schemas.FEATURES_SHARD_STATS,
    ("evaluation", "breakdown"): schemas.EVALUATION_BREAKDOWN,
    ("answers", ""): schemas.ANSWERS,
}


class Receipt(NamedTuple):
    """Proof that a shard is whole: written after its files."""

    shard: int
    rows: dict[str, int]  # by table
    files: dict[str, FileRecord]  # by name below data/

    def to_json(self) -> bytes:
        """As it is stored."""
        files = {name: record._asdict() for name, record in self.files.items()}
        return json_bytes({"shard": self.shard, "rows": self.rows, "files": files})

    @classmethod
    def from_json(cls, data: bytes) -> "Receipt | None":
        """None for what is no receipt, such as one cut short."""
        try:
            value = json.loads(data)
            files = {name: FileRecord(**record) for name, record in value["files"].items()}
            return cls(value["shard"], value["rows"], files)
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class ArtifactWriter:
    """Writes an artifact; what an earlier attempt finished is kept.

    Args:
        backend: where it goes.
        stage: its name.
        version: its version.
        hold: the exclusive right to write it.
    """

    def __init__(self, backend: Backend, stage: str, version: str, hold: Hold) -> None:
        self._backend, self._hold = backend, hold
        self.stage, self.version = stage, version
        self._key = artifact_key(stage, version)
        self._scratch = backend.scratch / f"{stage}-{version}"
        self._files: dict[str, FileRecord] = {}

    def finished_shards(self) -> dict[int, Receipt]:
        """The shards that are whole, by index; one whose file is gone or changed is not."""
        keys = [entry.key for entry in self._backend.list(f"{self._key}/parts/")]
        found = in_parallel(self._backend, self._receipt, keys)
        receipts = [receipt for receipt in found if receipt is not None]
        records = {
            self._data_key(name): record
            for receipt in receipts
            for name, record in receipt.files.items()
        }
        intact = self._backend.intact(records)
        return {
            receipt.shard: receipt
            for receipt in receipts
            if all(self._data_key(name) in intact for name in receipt.files)
        }

    def _receipt(self, key: str) -> Receipt | None:
        try:
            return Receipt.from_json(self._backend.read(key))
        except KeyError:
            return None

    def _data_key(self, name: str) -> str:
        return f"{self._key}/data/{name}"

    def put_shard(
        self, index: int, tables: Mapping[str, pa.Table], on_bytes: BytesDone = not_shown
    ) -> Receipt:
        """Write one shard of each table, then its receipt; arguments as of ``put_tables``."""
        receipt = self.put_tables(index, tables, on_bytes)
        self.put_receipt(receipt)
        return receipt

    def put_tables(
        self, index: int, tables: Mapping[str, pa.Table], on_bytes: BytesDone = not_shown
    ) -> Receipt:
        """Write one shard of each table, without the receipt that makes them count.

        Args:
            index: of the shard.
            tables: by table name.
            on_bytes: told of bytes as they are stored.

        Raises:
            StoreError: a table is not of its declared schema; nothing is written.
        """
        for table, content in tables.items():
            self._check(table, content)
        files = {}
        for table, content in tables.items():
            name = shard_name(table, index)
            files[name] = self._put(name, self._encoded(content), on_bytes)
        return Receipt(index, {t: content.num_rows for t, content in tables.items()}, files)

    def put_receipt(self, receipt: Receipt) -> None:
        """Make a shard's tables count."""
        self._hold.check()
        self._backend.put(f"{self._key}/parts/{receipt.shard:05d}.json", receipt.to_json())

    def _check(self, table: str, content: pa.Table) -> None:
        declared = DECLARED.get((self.stage, table))
        if declared is schemas.PAIRS:
            declared = schemas.pairs_schema(schemas.metadata_types(content.schema))
        if declared is not None:
            check_schema(content, declared)

    def _encoded(self, content: pa.Table) -> Path:
        return self._written(lambda path: write_parquet(content, path))

    def read_table(
        self, table: str, receipt: Receipt, columns: list[str] | None = None
    ) -> pa.Table:  # fmt: skip
        """Read back a table of a shard that is finished, or some of its columns."""
        name = shard_name(table, receipt.shard)
        path = self._backend.fetch(self._data_key(name), receipt.files[name])
        return pq.read_table(path, columns=columns)

    def put_table(self, table: str, content: pa.Table) -> None:
        """Write a table that is not sharded, as its shard 0."""
        self._check(table, content)
        self.put_file(shard_name(table, 0), self._encoded(content))

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write a data file."""
        self.put_file(name, self._written(lambda path: path.write_bytes(data)))

    def _written(self, write: Callable[[Path], object]) -> Path:
        path = self.scratch() / f"out-{uuid.uuid4().hex}"
        try:
            write(path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise explained(error, f"the store's scratch folder {str(path.parent)!r}") from error
        return path

    def put_file(self, name: str, path: Path, on_bytes: BytesDone = not_shown) -> None:
        """Write a data file from a local one, which is gone afterwards.

        Args:
            name: below ``data/``.
            path: the local file, on the disk of ``scratch()`` best of all.
            on_bytes: told of bytes as they are stored.
        """
        self._files[name] = self._put(name, path, on_bytes)

    def _put(self, name: str, path: Path, on_bytes: BytesDone) -> FileRecord:
        self._hold.check()
        return self._backend.put_file(self._data_key(name), path, on_bytes, self._hold.check)

    def scratch(self) -> Path:
        """A local folder for work in progress; what a killed run left in it is still there."""
        try:
            self._scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise explained(error, f"the store's scratch folder {str(self._scratch)!r}") from error
        return self._scratch

    def checkpoints(self) -> Checkpoints:
        """What this and earlier attempts saved of unfinished work."""
        return Checkpoints(self._backend, self._key, self._hold)

    def commit(self, made: Made) -> Artifact:
        """Write the manifest: from here on the artifact exists.

        A writer that lost a race against another gets the other's artifact, which is the same.

        Args:
            made: what the stage says of it.

        Raises:
            StoreError: shards are missing, or a file is not as large as it was written.
            HoldLost: another run may be writing the same artifact.
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
        stored = {entry.key: entry.size for entry in self._backend.list(f"{self._key}/data/")}
        self._check_sizes(files, stored)
        manifest = make_manifest(self.stage, self.version, made, files, rows)
        self._hold.check()
        key = f"{self._key}/{MANIFEST}"
        if not self._backend.create(key, json_bytes(manifest)):
            manifest = read_manifest(self._backend.read(key), self.stage, self.version)
        # Of an earlier attempt under other names; a glob over the folder would find them.
        kept = {self._data_key(name) for name in manifest["files"]}
        saved = [entry.key for entry in self._backend.list(f"{self._key}/checkpoints/")]
        self._backend.delete([*saved, *(key for key in stored if key not in kept)])
        # An upload whose begin was answered too late was begun twice.
        self._backend.sweep(f"{self._key}/", 0)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return Artifact(self._backend, self.stage, self.version, manifest)

    def _check_sizes(self, files: Mapping[str, FileRecord], stored: Mapping[str, int]) -> None:
        for name, record in files.items():
            size = stored.get(self._data_key(name))
            if size != record.bytes:
                raise StoreError(
                    f"{self.stage}/{self.version}: {name} was written with {record.bytes} bytes "
                    f"and has {size or 'none'} now; run the same command again"
                )
