"""Read and count the rows of a source: files, folders, globs, hub splits and remote files."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fpo_core.data.sources.addresses import is_remote, shown
from fpo_core.data.sources.csv_rows import csv_rows
from fpo_core.data.sources.folders import local_files
from fpo_core.data.sources.hub import SplitFiles, fetch_split, hub_split
from fpo_core.data.sources.identity import Resolved, identify_data
from fpo_core.data.sources.json_rows import count_lines, json_rows
from fpo_core.data.sources.kinds import kind_of
from fpo_core.data.sources.row import DataFile, Row
from fpo_core.data.sources.slices import Slice, split_slice
from fpo_core.data.sources.tables import arrow_rows, count_arrow, count_parquet, parquet_rows
from fpo_core.errors import FPOError


def read_rows(source: str | Path, resolved: Resolved | None = None) -> Iterator[Row]:
    """Stream a source's rows.

    A row that cannot be used comes with a fault and no columns; the caller counts it.

    Args:
        source: a file, a folder, FOLDER:SPLIT, a glob, OWNER/NAME:SPLIT on the hub, or an s3:// or
            https:// address; a slice such as [:10%] may follow.
        resolved: the files of a hub split or of an address, which ``identify_data`` returns. By
            default the name is resolved again.

    Yields:
        At least one row.

    Raises:
        FPOError: the source does not exist, cannot be fetched, holds no rows, or a file is damaged
            (named with line or row group).
    """
    base, part = split_slice(str(source))
    files = _files(base, resolved)
    rows = (row for file in files for row in _file_rows(file))
    if part:
        chosen = _chosen(files, part)
        rows = islice(rows, chosen.start, chosen.stop)
    first = next(rows, None)
    if first is None:
        what = f"the slice {part} of data" if part else "data file" if len(files) == 1 else "data"
        raise FPOError(f"{what} {shown(base)!r} holds no rows")
    yield first
    yield from rows


def read_sound_rows(source: str | Path, resolved: Resolved | None = None) -> Iterator[Row]:
    """Stream a source's rows where none may be left out, as in a benchmark's files.

    Args:
        source: as ``read_rows`` takes it.
        resolved: as ``read_rows`` takes it.

    Yields:
        Rows without faults.

    Raises:
        FPOError: as ``read_rows``; also where a row has a fault.
    """
    for row in read_rows(source, resolved):
        if row.fault:
            raise FPOError(f"{row.where}: {row.fault.detail}")
        yield row


def count_rows(source: str | Path, resolved: Resolved | None = None) -> int:
    """Return a source's number of rows, those with faults included.

    Parquet and Arrow files are counted by their metadata and rows of one line each by their lines;
    other files are read.

    Args:
        source: as ``read_rows`` takes it.
        resolved: as ``read_rows`` takes it.

    Raises:
        FPOError: the source does not exist, or a file is damaged.
    """
    base, part = split_slice(str(source))
    total = sum(map(_count, _files(base, resolved)))
    return len(part.bounds(total)) if part else total


def _files(base: str, resolved: Resolved | None) -> list[DataFile]:
    if resolved is None and (is_remote(base) or hub_split(base)):
        found = identify_data(base)
        if not found.resolved:
            raise FPOError(
                f"data {base!r}: the hub cannot be reached, and its cache has not all files of the "
                f"split. Check the network"
            )
        resolved = found.files
    if resolved is None:
        return list(local_files(base).files)
    if not isinstance(resolved, SplitFiles):
        return list(resolved.files)
    paths = fetch_split(resolved)
    named = len(paths) > 1
    return [DataFile(path, f"{base} ({path.name})" if named else base, path.name) for path in paths]


def _chosen(files: list[DataFile], part: Slice) -> range:
    """Return the rows of a slice; only some slices need the rows counted."""
    return part.bounds(sum(map(_count, files)) if part.needs_count else sys.maxsize)


def _file_rows(file: DataFile) -> Iterator[Row]:
    kind = kind_of(file)
    if kind == "json":
        return json_rows(file)
    if kind == "parquet":
        return parquet_rows(file)
    if kind == "arrow":
        return arrow_rows(file)
    return csv_rows(file, "," if kind == "csv" else "\t")


def _count(file: DataFile) -> int:
    kind = kind_of(file)
    if kind == "parquet":
        return count_parquet(file)
    if kind == "arrow":
        return count_arrow(file)
    if kind == "json" and (lines := count_lines(file)) is not None:
        return lines
    return sum(1 for _ in _file_rows(file))
