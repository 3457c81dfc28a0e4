"""Rows written in every kind of file by the libraries that people write them with."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq

from fpo_core.data.sources import read_rows

Rows = Sequence[dict[str, Any]]
ROWS: list[dict[str, Any]] = [
    {"prompt": "How many legs has a spider?", "chosen": "Eight.", "rejected": 'Ma\nny, "I" say'},
    {"prompt": "Café? 😀", "chosen": "Oui,\tci.", "rejected": "Non; \u2028no."},
    {"prompt": "Third", "chosen": "3", "rejected": "three"},
]


def values(source: Path | str) -> list[dict[str, Any]]:
    """Return the rows of a source, none of which has a fault."""
    rows = list(read_rows(source))
    assert not any(row.fault for row in rows)
    return [row.value for row in rows]


def _jsonl(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _pretty(rows: Rows) -> bytes:
    return "\n".join(json.dumps(row, indent=2) for row in rows).encode()


def _separated(delimiter: str) -> Callable[[Rows], bytes]:
    def write(rows: Rows) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()

    return write


def _parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=2)
    return sink.getvalue()


def _stream(rows: Rows) -> bytes:
    table = pa.Table.from_pylist(list(rows))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def _feather(rows: Rows) -> bytes:
    sink = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist(list(rows)), sink, chunksize=2)
    return sink.getvalue()


# How a file of a name is written, but for the compression.
WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "d.jsonl": _jsonl,
    "pretty.jsonl": _pretty,
    "list.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "lines.json": _jsonl,
    "d.csv": _separated(","),
    "d.tsv": _separated("\t"),
    "d.parquet": _parquet,
    "d.arrow": _stream,
    "d.feather": _feather,
}


def write(file: Path, rows: Rows) -> Path:
    """Write rows to a file of the kind, and with the compression, that its name says."""
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    writer = WRITERS.get(name) or next(
        make for known, make in WRITERS.items() if known.endswith(Path(name).suffix)
    )
    data = writer(rows)
    if file.suffix == ".gz":
        data = gzip.compress(data)
    if file.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    file.write_bytes(data)
    return file
