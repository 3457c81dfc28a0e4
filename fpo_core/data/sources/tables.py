"""Rows of Parquet and Arrow files, streamed; damaged ones are named, with the row group."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fpo_core.data.sources.arrow_values import batch_rows, check_columns
from fpo_core.data.sources.compression import open_seekable
from fpo_core.data.sources.row import DataFile, Row
from fpo_core.errors import FPOError

BATCH_ROWS = 256
_FILE = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def parquet_rows(file: DataFile) -> Iterator[Row]:
    """Stream the rows of a Parquet file, one row group at a time.

    Args:
        file: the file to read.

    Raises:
        FPOError: the file is damaged, or two of its columns share a name.
    """
    with _parquet(file) as table:
        first = 1
        for group in range(table.metadata.num_row_groups):
            with _damage(file, "Parquet", f"row group {group + 1}: "):
                batches = table.iter_batches(BATCH_ROWS, row_groups=[group])
                while (batch := next(batches, None)) is not None:
                    yield from batch_rows(batch, file.name, first)
                    first += batch.num_rows


def count_parquet(file: DataFile) -> int:
    """Return a Parquet file's number of rows, from its footer.

    Args:
        file: the file to look at.

    Raises:
        FPOError: the file is damaged.
    """
    with _parquet(file) as table:
        return table.metadata.num_rows


def arrow_rows(file: DataFile) -> Iterator[Row]:
    """Stream the rows of an Arrow file (Feather) or stream, one batch at a time.

    Args:
        file: the file to read.

    Raises:
        FPOError: the file is damaged or cut off, or two of its columns share a name.
    """
    first = 1
    with _damage(file, "Arrow"):
        for batch in _arrow_batches(file):
            for start in range(0, batch.num_rows, BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                yield from batch_rows(part, file.name, first)
                first += part.num_rows


def count_arrow(file: DataFile) -> int:
    """Return an Arrow file's number of rows, without turning them into Python values.

    Args:
        file: the file to look at.

    Raises:
        FPOError: the file is damaged or cut off.
    """
    return sum(batch.num_rows for batch in _arrow_batches(file))


@contextmanager
def _damage(file: DataFile, kind: str, part: str = "") -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise FPOError(
            f"{file.name}: {part}not a readable {kind} file ({_first_line(error)}). It is damaged "
            f"or cut off; fetch or write it again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


@contextmanager
def _parquet(file: DataFile) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with open_seekable(file) as content:
        with _damage(file, "Parquet"):
            table = pq.ParquetFile(content, page_checksum_verification=True)
            schema = table.schema_arrow
        with table:
            check_columns(schema, file.name)
            yield table


def _arrow_batches(file: DataFile) -> Iterator[Any]:
    import pyarrow as pa

    with open_seekable(file) as content, _damage(file, "Arrow"):
        mapped = (
            pa.memory_map(str(content)) if isinstance(content, Path) else pa.PythonFile(content)
        )
        batches, schema = _arrow_reader(mapped, file.name)
        check_columns(schema, file.name)
        number = 0
        while True:
            number += 1
            with _damage(file, "Arrow", f"batch {number}: "):
                batch = next(batches, None)
                if batch is None:
                    return
                _check(batch)
            yield batch


def _arrow_reader(content: Any, name: str) -> tuple[Iterator[Any], Any]:
    """Open either format; return its batches and its schema."""
    import pyarrow as pa

    start = content.read(len(_FILE))
    content.seek(0)
    if start == _FILE:
        table = pa.ipc.open_file(content)
        batches = (table.get_batch(index) for index in range(table.num_record_batches))
        return batches, table.schema
    if start[:4] == _END_OF_STREAM[:4]:
        # Arrow takes a stream that is cut between two batches for a whole one.
        content.seek(content.size() - len(_END_OF_STREAM))
        if content.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
            raise FPOError(
                f"{name}: the Arrow stream has no end mark, so it is cut off. Fetch or write it "
                f"again"
            )
        content.seek(0)
    stream = pa.ipc.open_stream(content)
    return iter(stream), stream.schema


def _check(batch: Any) -> None:
    """Check lengths and offsets, which Arrow trusts; other text than UTF-8 is its row's fault."""
    import pyarrow as pa

    batch.validate()
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
