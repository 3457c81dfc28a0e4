"""A finished artifact: its files are checked against the manifest when they are first used."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from storage.backend import Backend, BytesDone, FileRecord, in_parallel, not_shown
from storage.errors import ArtifactCorrupt, ArtifactMissing, FileDamaged, StoreError
from storage.manifest import Manifest, file_records
from storage.parquet import CHECKED

# Each is one stream, hashed as it comes: a core's work.
PARALLEL_FILES = max(2, min(8, os.cpu_count() or 2))


def artifact_key(stage: str, version: str) -> str:
    """The key prefix of an artifact."""
    return f"artifacts/{stage}/{version}"


def shard_name(table: str, index: int) -> str:
    """File name of a shard, below ``data/``."""
    return f"{table}/{index:05d}.parquet" if table else f"{index:05d}.parquet"


class Artifact:
    """A committed artifact.

    Args:
        backend: where it is kept.
        stage: its name, such as ``pairs``.
        version: its version.
        manifest: its manifest.
    """

    def __init__(self, backend: Backend, stage: str, version: str, manifest: Manifest) -> None:
        self._backend = backend
        self.stage, self.version, self.manifest = stage, version, manifest
        self.files = file_records(manifest)
        self._local: dict[str, Path] = {}
        self._footers: dict[str, pq.FileMetaData] = {}

    @property
    def name(self) -> str:
        """``stage/version``."""
        return f"{self.stage}/{self.version}"

    def key(self, file: str) -> str:
        """The key of a data file."""
        return f"{artifact_key(self.stage, self.version)}/data/{file}"

    def path(self, file: str, on_bytes: BytesDone = not_shown) -> Path:
        """Local path of a data file, its size and sha256 verified; downloaded where needed.

        Args:
            file: its name below ``data/``.
            on_bytes: told of bytes as they are here.

        Raises:
            ArtifactCorrupt: naming the file, what was expected and found, and the remedy.
            StoreError: the artifact has no such file.
        """
        if file not in self._local:
            with self._damage_told(file) as record:
                self._local[file] = self._backend.fetch(self.key(file), record, on_bytes)
        return self._local[file]

    def copy_to(self, file: str, path: Path) -> None:
        """Write a data file to a path of one's own, verified; raises as ``path`` does."""
        with self._damage_told(file) as record:
            self._backend.copy_to(self.key(file), record, path)

    @contextmanager
    def _damage_told(self, file: str) -> Iterator[FileRecord]:
        record = self.files.get(file)
        if record is None:
            raise StoreError(f"{self.name} has no file {file!r}")
        try:
            yield record
        except FileDamaged as error:
            raise ArtifactCorrupt(
                f"{self.name} is damaged: {file}: {error}", self.stage, self.version
            ) from error

    def paths(self, files: Sequence[str], on_bytes: BytesDone = not_shown) -> list[Path]:
        """The same for several files, some of them at a time."""
        return in_parallel(
            self._backend, lambda file: self.path(file, on_bytes), files, PARALLEL_FILES
        )

    def num_shards(self, table: str = "") -> int:
        """Number of shards of a table."""
        count = 0
        while shard_name(table, count) in self.files:
            count += 1
        return count

    def shard_path(self, shard: int, table: str = "") -> Path:
        """Verified local path of one shard."""
        return self.path(shard_name(table, shard))

    def shard_paths(self, table: str = "", on_bytes: BytesDone = not_shown) -> list[Path]:
        """Verified local paths of all shards of a table, in order."""
        names = [shard_name(table, shard) for shard in range(self.num_shards(table))]
        return self.paths(names, on_bytes)

    def table(self, table: str = "", shard: int = 0) -> pa.Table:
        """One shard as a table."""
        path = self.shard_path(shard, table)
        try:
            return pq.read_table(path)
        except FileNotFoundError as error:
            raise ArtifactMissing(
                f"{self.name} was removed while it was read; run the same command again"
            ) from error

    def rows(self, table: str, shard: int, rows: slice | None, columns: Sequence[str]) -> pa.Table:
        """Some columns of some rows of a shard; of S3, no more is fetched than their row groups.

        What is read is checked against the checksums of its Parquet pages. A file from before they
        were written is verified as a whole.

        Args:
            table: its name, as in ``shard_path``.
            shard: its number.
            rows: of the shard, from and to; None: all.
            columns: which.

        Raises:
            ArtifactCorrupt: naming the file.
        """
        name = shard_name(table, shard)
        with self._damage_told(name) as record, ExitStack() as stack:
            stream = stack.enter_context(self._backend.open(self.key(name), record))
            try:
                file = pq.ParquetFile(
                    stream, metadata=self._footers.get(name), pre_buffer=True,
                    page_checksum_verification=True,
                )  # fmt: skip
                self._footers[name] = file.metadata
                if CHECKED in (file.metadata.metadata or {}):
                    return _read_rows(file, rows, columns)
            except (pa.ArrowException, OSError) as error:
                raise FileDamaged(str(error).partition("\n")[0]) from error
        with pq.ParquetFile(self.path(name), metadata=self._footers[name]) as file:
            return _read_rows(file, rows, columns)

    def schema(self, table: str = "") -> pa.Schema:
        """Return the schema of a table from its first shard; from S3, only the footer is fetched.

        Raises:
            ArtifactCorrupt: The footer cannot be read.
        """
        name = shard_name(table, 0)
        with self._damage_told(name) as record, self._backend.open(self.key(name), record) as file:
            try:
                found = pq.ParquetFile(file, metadata=self._footers.get(name))
            except (pa.ArrowException, OSError) as error:
                raise FileDamaged(str(error).partition("\n")[0]) from error
            self._footers[name] = found.metadata
            return found.schema_arrow

    def is_here(self, name: str) -> bool:
        """Whether all files of a folder are on this machine: ``folder`` has nothing to fetch."""
        inside = {key: one for key, one in self.files.items() if key.startswith(f"{name}/")}
        return all(self._backend.is_here(self.key(key), one) for key, one in inside.items())

    def tables(self, table: str = "") -> Iterator[pa.Table]:
        """All shards of a table, in order."""
        for shard in range(self.num_shards(table)):
            yield self.table(table, shard)

    def scan(self, table: str = "") -> pl.LazyFrame:
        """All shards of a table as one lazy polars frame."""
        return pl.scan_parquet(self.shard_paths(table))

    def folder(self, name: str, on_bytes: BytesDone = not_shown) -> Path:
        """A verified local folder of data files, such as ``model``."""
        inside = [file for file in self.files if file.startswith(f"{name}/")]
        if not inside:
            raise StoreError(f"{self.name} has no folder {name!r}")
        paths = self.paths(inside, on_bytes)
        short = [file.removeprefix(f"{name}/") for file in inside]
        return self._backend.folder(self.key(name), dict(zip(short, paths, strict=True)))


def _read_rows(file: pq.ParquetFile, rows: slice | None, columns: Sequence[str]) -> pa.Table:
    if rows is None:
        return file.read(list(columns))
    groups = range(file.num_row_groups)
    ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups])
    first = int(np.searchsorted(ends, rows.start, side="right"))
    last = int(np.searchsorted(ends, rows.stop - 1, side="right"))
    table = file.read_row_groups(list(groups[first : last + 1]), list(columns))
    return table.slice(rows.start - int(ends[first - 1] if first else 0), rows.stop - rows.start)
