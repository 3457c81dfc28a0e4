"""Shards open without this project: polars, DuckDB, pyarrow and ``datasets``, on disk and on S3.

All that the tests take from here is the declared schemas and the bytes of a shard. The S3 side is
SeaweedFS, filled with plain boto3. ``datasets`` opens S3 through pyarrow's file system: s3fs would
hold boto3 back.
"""

import io
import json
import uuid
from collections.abc import Callable

import datasets
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset

from storage import schemas
from storage.parquet import parquet_bytes
from tests.storage.readers import (
    COLUMNS,
    PAIR,
    READERS,
    DuckDB,
    HuggingFace,
    Login,
    Polars,
    PyArrow,
    Reader,
    Stored,
)

BUCKET = "fpo-tests"
SHARDS = 2
PAIRS = 20  # a shard
TABLES = {
    "pairs": schemas.PAIRS,
    "reference": schemas.REFERENCE,
    "features/pooled": schemas.FEATURES_POOLED,
    "features/tokens": schemas.FEATURES_TOKENS,
    "features/stats": schemas.FEATURES_STATS,
    "features/shard_stats": schemas.FEATURES_SHARD_STATS,
}

# What each reader calls a declared type. In the order polars, DuckDB, pyarrow, datasets.
EXAMPLE = "pair_id: string, side: string, position: int32, value: float"
SEEN_AS = {
    "string": ("String", "VARCHAR", "string", "Value('string')"),
    "int32": ("Int32", "INTEGER", "int32", "Value('int32')"),
    "int64": ("Int64", "BIGINT", "int64", "Value('int64')"),
    "uint32": ("UInt32", "UINTEGER", "uint32", "Value('uint32')"),
    "float": ("Float32", "FLOAT", "float", "Value('float32')"),
    "double": ("Float64", "DOUBLE", "double", "Value('float64')"),
    "list<item: int32>": (
        "List(Int32)", "INTEGER[]", "list<element: int32>", "List(Value('int32'))",
    ),
    "list<item: uint32>": (
        "List(UInt32)", "UINTEGER[]", "list<element: uint32>", "List(Value('uint32'))",
    ),
    "list<item: float>": (
        "List(Float32)", "FLOAT[]", "list<element: float>", "List(Value('float32'))",
    ),
    f"list<item: struct<{EXAMPLE}>>": (
        "List(Struct({'pair_id': String, 'side': String, 'position': Int32, 'value': Float32}))",
        'STRUCT(pair_id VARCHAR, side VARCHAR, "position" INTEGER, "value" FLOAT)[]',
        f"list<element: struct<{EXAMPLE}>>",
        "List({'pair_id': Value('string'), 'side': Value('string'),"
        " 'position': Value('int32'), 'value': Value('float32')})",
    ),
}  # fmt: skip


# -- what is written, and where --


def example(kind: pa.DataType, row: int) -> object:
    """A value of any declared type, another one in each row; lists are empty in some."""
    if pa.types.is_list(kind):
        return [example(kind.value_type, row + i) for i in range(row % 4)]
    if pa.types.is_struct(kind):
        return {
            kind.field(i).name: example(kind.field(i).type, row) for i in range(kind.num_fields)
        }
    if pa.types.is_floating(kind):
        return row / 3  # needs all bits of a float32
    return f"{row:016x}" if pa.types.is_string(kind) else row


def shard(table: str, number: int) -> pa.Table:
    """A shard of a table: two rows a pair. Pair ids grow, so that a pair lies in one shard only."""
    schema = TABLES[table]
    span = range(2 * PAIRS * number, 2 * PAIRS * (number + 1))
    columns = {field.name: [example(field.type, row) for row in span] for field in schema}
    if "pair_id" in columns:
        columns["pair_id"] = [example(pa.string(), row // 2) for row in span]
    return pa.table(columns, schema=schema)


def rows(table: str) -> list[dict]:
    """All rows of a table as they were written."""
    return [row for number in range(SHARDS) for row in shard(table, number).to_pylist()]


TWO_ROWS = [
    {name: row[name] for name in COLUMNS}
    for row in rows("features/pooled")
    if row["pair_id"] == PAIR
]


def scar(data: bytes, columns: set[str]) -> bytes:
    """A shard whose pages of these columns are zeros. The footer stays whole."""
    scarred = bytearray(data)
    meta = pq.read_metadata(io.BytesIO(data))
    for group in map(meta.row_group, range(meta.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in columns:
                size = column.total_compressed_size
                start = column.dictionary_page_offset or column.data_page_offset
                scarred[start : start + size] = bytes(size)
    return bytes(scarred)


@pytest.fixture(scope="module", params=["disk", "s3"])
def put(request, tmp_path_factory) -> Callable[[dict[str, bytes]], Stored]:
    """Store files by key, on disk and on S3."""

    def on_disk(files: dict[str, bytes]) -> Stored:
        root = tmp_path_factory.mktemp("store")
        for key, data in files.items():
            (root / key).parent.mkdir(parents=True, exist_ok=True)
            (root / key).write_bytes(data)
        return Stored(str(root), None)

    def on_s3(files: dict[str, bytes]) -> Stored:
        server = request.getfixturevalue("seaweed")
        prefix = f"readers-{uuid.uuid4().hex[:12]}"
        for key, data in files.items():
            server.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{key}", Body=data)
        login = Login(server.endpoint, server.access_key, server.secret_key)
        return Stored(f"s3://{BUCKET}/{prefix}", login)

    return on_disk if request.param == "disk" else on_s3


def shards(tables: dict[str, list[bytes]]) -> dict[str, bytes]:
    """Files of a store by key."""
    layout = Stored("", None)
    return {
        f"{layout.folder(table)}/{number:05d}.parquet".lstrip("/"): data
        for table, every in tables.items()
        for number, data in enumerate(every)
    }


@pytest.fixture(scope="module")
def stored(put) -> Stored:
    """Every declared table, in two shards."""
    every = {name: [parquet_bytes(shard(name, n)) for n in range(SHARDS)] for name in TABLES}
    return put(shards(every))


@pytest.fixture(scope="module")
def scarred(put) -> Stored:
    """Pooled features that can only be read in part.

    In the first shard nobody can read ``indices`` and ``values``, in the second nothing at all.
    """
    name = "features/pooled"
    first, second = (parquet_bytes(shard(name, number)) for number in range(SHARDS))
    damaged = [scar(first, {"indices", "values"}), scar(second, set(TABLES[name].names))]
    return put(shards({name: damaged}))


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    """``datasets`` keeps its lock files in the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


every_reader = pytest.mark.parametrize("reader", READERS, ids=lambda reader: type(reader).__name__)


# -- what they have to show --


@every_reader
def test_all_tables_read_as_they_were_written(reader: Reader, stored: Stored):
    for table in TABLES:
        assert reader.everything(stored, table) == rows(table), table


@every_reader
def test_names_and_types_are_the_declared_ones(reader: Reader, stored: Stored):
    number = READERS.index(reader)
    for table, schema in TABLES.items():
        assert reader.types(stored, table) == {
            field.name: SEEN_AS[str(field.type).replace(" not null", "")][number]
            for field in schema
        }, table


@every_reader
def test_only_what_is_asked_for_is_read(reader: Reader, stored: Stored, scarred: Stored):
    """Two columns of one pair: neither other columns nor the other shard are touched."""
    assert len(TWO_ROWS) == 2
    assert reader.pair(stored) == TWO_ROWS
    assert reader.pair(scarred) == TWO_ROWS
    with pytest.raises(reader.damage):
        reader.everything(scarred, "features/pooled")


def test_polars_plans_filter_and_projection_in_the_scan(stored):
    plan = Polars().query(stored).explain()
    assert f"PROJECT {len(COLUMNS)}/10 COLUMNS" in plan
    assert f'SELECTION: col("pair_id") == "{PAIR}"' in plan
    assert "FILTER" not in plan


def check_duckdb_plan(found: dict) -> None:
    """One operator, the scan, does it all."""
    [scan] = json.loads(found["explain_value"])
    assert scan["children"] == []
    assert "SCAN" in scan["name"] or scan["name"] == "READ_PARQUET"
    assert scan["extra_info"]["Projections"] == COLUMNS
    assert "pair_id" in scan["extra_info"]["Filters"]
    assert PAIR in scan["extra_info"]["Filters"]


def test_duckdb_plans_filter_and_projection_in_the_scan(stored):
    duck = DuckDB()
    query = f"explain (format json) {duck.query}"
    [found] = duck.sql(stored, query, stored.glob("features/pooled"), PAIR)
    check_duckdb_plan(found)


def test_pyarrow_scans_the_columns_of_the_row_groups_that_may_match(stored):
    arrow = PyArrow()
    assert arrow.scanner(stored).projected_schema.names == COLUMNS
    first, second = arrow.dataset(stored, "features/pooled").get_fragments()
    assert len(first.subset(arrow.condition).row_groups) == 1
    assert len(second.subset(arrow.condition).row_groups) == 0


def test_datasets_streams_the_columns_that_were_asked_for(stored):
    stream = HuggingFace().query(stored)
    assert isinstance(stream, IterableDataset)
    assert list(stream.features or {}) == COLUMNS
    assert stream.num_shards == SHARDS


def test_duckdb_pushes_both_into_a_pyarrow_dataset(stored):
    """The way to S3 for a DuckDB without its extension."""
    source = PyArrow().dataset(stored, "features/pooled")
    connection = duckdb.connect()
    connection.register("pooled", source)
    query = "select pair_id, mass from pooled where pair_id = ?"
    found = connection.sql(query, params=[PAIR]).to_arrow_table()
    assert found.to_pylist() == TWO_ROWS
    plan = connection.sql(f"explain (format json) {query}", params=[PAIR]).to_arrow_table()
    check_duckdb_plan(plan.to_pylist()[0])
