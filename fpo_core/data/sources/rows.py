"""Read rows from JSON, JSONL and Parquet files, each row with the place it came from.

The files are those of this machine, or of a split on the hub.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fpo_core.data.sources.hub import SplitFiles, fetch_split
from fpo_core.errors import FPOError


class Row(NamedTuple):
    """One row of a data file."""

    value: dict[str, Any]
    where: str  # "file.jsonl, line 3" or "file.json, row 3"; starts with the name as given


def read_rows(path: str | Path, hub: SplitFiles | None = None) -> Iterator[Row]:
    """Stream a source's rows.

    Args:
        path: the file, or the name of a split on the hub.
        hub: the split's files (``identify_data`` has them); they are fetched where needed.

    Raises:
        FPOError: file missing, empty, of unknown kind or not JSON (with file and line); a split
            that cannot be fetched.
    """
    if hub:
        for file in fetch_split(hub):
            part = f" ({file.name})" if len(hub.files) > 1 else ""
            yield from _rows(file, f"{path}{part}", lines_in_json=True)
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise FPOError(
            f"data file {str(path)!r} does not exist; a relative path starts at the folder the "
            f"command runs in"
        )
    yield from _rows(file, str(file))


def _rows(file: Path, name: str, *, lines_in_json: bool = False) -> Iterator[Row]:
    """A file's rows; ``lines_in_json`` takes a row a line under the name .json, too."""
    if file.stat().st_size == 0:
        raise FPOError(f"data file {name!r} is empty")
    suffix = file.suffix.lower()
    if suffix == ".json" and lines_in_json and not _is_list(file):
        suffix = ".jsonl"
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(file, name)
    elif suffix == ".json":
        yield from _json_array(file, name)
    elif suffix == ".parquet":
        yield from _parquet(file, name)
    else:
        raise FPOError(f"data file {name!r}: unknown kind; use .jsonl, .json or .parquet")


def _is_list(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(1024).lstrip().startswith(b"[")


def _json_lines(file: Path, name: str) -> Iterator[Row]:
    seen = False
    with file.open(encoding="utf-8") as stream:
        number = 0
        while True:
            number += 1
            where = f"{name}, line {number}"
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
        raise FPOError(f"data file {name!r} holds no rows")


def _json_array(file: Path, name: str) -> Iterator[Row]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FPOError(f"{name}: not UTF-8 text ({error.reason})") from error
    rows = _parse(text, name)
    if not isinstance(rows, list):
        raise FPOError(
            f"{name}: a .json data file holds one list of rows; for a row a line use .jsonl"
        )
    if not rows:
        raise FPOError(f"data file {name!r} holds no rows")
    for number, value in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        yield Row(_object(value, where), where)


def _parquet(file: Path, name: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            if table.metadata.num_rows == 0:
                raise FPOError(f"data file {name!r} holds no rows")
            number = 0
            for batch in table.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{name}, row {number}")
    except pa.ArrowInvalid as error:
        raise FPOError(f"{name}: not a readable Parquet file ({error})") from error


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
