"""Read rows from JSON, JSONL and Parquet files, each row with the place it came from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fpo_core.errors import FPOError


class Row(NamedTuple):
    """One row of a data file."""

    value: dict[str, Any]
    where: str  # "file.jsonl, line 3" or "file.json, row 3"; starts with the name as given


def read_rows(path: str | Path) -> Iterator[Row]:
    """Stream a file's rows.

    Raises:
        FPOError: file missing, empty, of unknown kind or not JSON (with file and line).
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FPOError(
            f"data file {str(path)!r} does not exist; a relative path starts at the folder the "
            f"command runs in"
        )
    if file.stat().st_size == 0:
        raise FPOError(f"data file {str(path)!r} is empty")
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(file)
    elif suffix == ".json":
        yield from _json_array(file)
    elif suffix == ".parquet":
        yield from _parquet(file)
    else:
        raise FPOError(f"data file {str(path)!r}: unknown kind; use .jsonl, .json or .parquet")


def _json_lines(file: Path) -> Iterator[Row]:
    seen = False
    with file.open(encoding="utf-8") as stream:
        number = 0
        while True:
            number += 1
            where = f"{file}, line {number}"
            try:
                line = stream.readline()
            except UnicodeDecodeError as error:
                raise FPOError(f"{where}: not UTF-8 text ({error.reason})") from error
            if not line:
                break
            if not line.strip():
                continue
            seen = True
            yield Row(_object(_parse(line, where), where), where)
    if not seen:
        raise FPOError(f"data file {str(file)!r} holds no rows")


def _json_array(file: Path) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FPOError(f"{file}: not UTF-8 text ({error.reason})") from error
    rows = _parse(text, str(file))
    if not isinstance(rows, list):
        raise FPOError(
            f"{file}: a .json data file holds one list of rows; for a row a line use .jsonl"
        )
    if not rows:
        raise FPOError(f"data file {str(file)!r} holds no rows")
    for number, value in enumerate(rows, start=1):
        where = f"{file}, row {number}"
        yield Row(_object(value, where), where)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if table.metadata.num_rows == 0:
                raise FPOError(f"data file {str(file)!r} holds no rows")
            number = 0
            for batch in table.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{file}, row {number}")
    except pa.ArrowInvalid as error:
        raise FPOError(f"{file}: not a readable Parquet file ({error})") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if ", line" not in where else ""
        raise FPOError(f"{where}{line}: not JSON ({error.msg}, column {error.colno})") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FPOError(f"{where}: a row is a JSON object, this is {type(value).__name__}")
    return value
