"""Write Parquet shards: the same table always gives the same bytes."""

import io
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.errors import StoreError

# As measured: benchmarks/RESULTS.md, "Parquet shards".
COMPRESSION_LEVEL = 3
ROW_GROUP_ROWS = 32_768  # a reader on S3 fetches only the groups that hold what it looks for
# In the metadata of files whose pages have checksums, which nothing else in a footer tells.
CHECKED = b"fpo.page_checksums"


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as Parquet, in memory."""
    sink = io.BytesIO()
    write_parquet(table, sink)
    return sink.getvalue()


def write_parquet(table: pa.Table, sink: Path | IO[bytes]) -> None:
    """Write a table: zstd, dictionaries on ids and text, byte_stream_split on floats."""
    floats: Any = []
    others: Any = []
    for path, kind in _leaves(table.schema):
        (floats if pa.types.is_floating(kind) else others).append(path)
    pq.write_table(
        table.replace_schema_metadata({**(table.schema.metadata or {}), CHECKED: b"crc32"}), sink,
        compression="zstd", compression_level=COMPRESSION_LEVEL,
        row_group_size=ROW_GROUP_ROWS,
        use_dictionary=others, use_byte_stream_split=floats, write_page_index=True,
        write_page_checksum=True,  # for who reads parts of a file, which the sha256 is not of
    )  # fmt: skip


def check_schema(table: pa.Table, expected: pa.Schema) -> None:
    """Refuse a table that is not of the declared schema.

    Raises:
        StoreError: naming the first field that differs.
    """
    if table.schema.equals(expected):
        return
    for want in expected:
        index = table.schema.get_field_index(want.name)
        got = None if index < 0 else table.schema.field(index)
        if got is None or not got.equals(want):
            raise StoreError(f"table field {want.name!r} should be {want}, it is {got}")
    raise StoreError(f"table has fields {table.schema.names}, declared are {expected.names}")


def _leaves(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    """Column paths as Parquet names them, with their primitive types.

    Arrow calls a list's field ``item``; Parquet calls it ``element``, and pyarrow ignores encodings
    asked for under any other path.
    """

    def walk(path: str, kind: pa.DataType) -> list[tuple[str, pa.DataType]]:
        if pa.types.is_list(kind):
            return walk(f"{path}.list.element", kind.value_type)
        if pa.types.is_struct(kind):
            inner = (kind.field(i) for i in range(kind.num_fields))
            return [leaf for field in inner for leaf in walk(f"{path}.{field.name}", field.type)]
        return [(path, kind)]

    return [leaf for field in schema for leaf in walk(field.name, field.type)]
