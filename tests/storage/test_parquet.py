"""Shards as Parquet: stable bytes, the encodings asked for, schemas that are a contract."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import schemas
from storage.errors import StoreError
from storage.parquet import check_schema, parquet_bytes
from storage.writer import DECLARED


def pooled(rows: int = 300) -> pa.Table:
    """Rows of features/pooled with a thousand different features."""
    return pa.table(
        {
            "pair_id": [f"{n:016x}" for n in range(rows)],
            "side": ["chosen", "rejected"] * (rows // 2),
            "n_tokens": [n % 40 for n in range(rows)],
            "indices": [[(7 * n + i) % 1000 for i in range(50)] for n in range(rows)],
            "values": [[1 / (1 + n + i) for i in range(50)] for n in range(rows)],
            "nonzero": [50] * rows,
            "mass": [float(n) for n in range(rows)],
            "cutoff": [0.0] * rows,
            "pinned": [[3, 700]] * rows,
            "pinned_values": [[0.0, 1.5]] * rows,
        },
        schema=schemas.FEATURES_POOLED,
    )


def test_the_same_table_gives_the_same_bytes_and_reads_back():
    table = pooled()
    data = parquet_bytes(table)
    assert data == parquet_bytes(pooled())
    assert pq.read_table(io.BytesIO(data)).equals(table)


def test_encodings_reach_the_columns_inside_lists():
    """Read from the file: pyarrow says nothing about a column path that it does not know."""
    meta = pq.ParquetFile(io.BytesIO(parquet_bytes(pooled()))).metadata.row_group(0)
    columns = {meta.column(i).path_in_schema: meta.column(i) for i in range(meta.num_columns)}
    assert "RLE_DICTIONARY" in columns["indices.list.element"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["values.list.element"].encodings
    assert {column.compression for column in columns.values()} == {"ZSTD"}


def test_another_schema_is_refused_by_field():
    table = pooled()
    wrong = table.set_column(2, "n_tokens", table["n_tokens"].cast(pa.int64()))
    with pytest.raises(StoreError, match="'n_tokens' should be"):
        check_schema(wrong, schemas.FEATURES_POOLED)
    with pytest.raises(StoreError, match="fields"):
        check_schema(table.append_column("more", pa.nulls(300)), schemas.FEATURES_POOLED)


def documented(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """The tables of docs/tables.md: name -> (field, type, meaning) in order."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("## `"):
            name = line.split("`")[1]
            found[name] = []
        elif name and line.startswith("| `"):
            field, kind, meaning = (cell.strip() for cell in line.strip("|").split("|"))
            found[name].append((field.strip("`"), kind.strip("`"), meaning))
    return found


def test_the_schemas_are_what_the_documentation_promises():
    """The public contract: to change a field, change docs/tables.md and SCHEMA_VERSION with it."""
    text = (Path(__file__).parents[2] / "docs" / "tables.md").read_text()
    declared = {
        f"{artifact}/{table}".rstrip("/"): [
            (
                field.name,
                str(field.type).replace(" not null", ""),
                field.metadata[b"description"].decode(),
            )
            for field in schema
        ]
        for (artifact, table), schema in DECLARED.items()
    }
    assert documented(text) == declared
    assert f"Schema version: {schemas.SCHEMA_VERSION}." in text


METADATA = {
    "topic": pa.string(),
    "turns": pa.int64(),
    "score": pa.float64(),
    "checked": pa.bool_(),
}


def test_metadata_columns_follow_the_fixed_ones_and_are_found_again_in_the_file():
    schema = schemas.pairs_schema(METADATA)
    assert schema.names == [*schemas.PAIRS.names, *METADATA]
    assert all(schema.field(name).nullable for name in METADATA)
    read = pq.read_schema(io.BytesIO(parquet_bytes(schema.empty_table())))
    assert schemas.metadata_columns(read) == list(METADATA)
    assert schemas.metadata_types(read) == METADATA
    assert schemas.pairs_schema({}).equals(schemas.PAIRS, check_metadata=True)
    assert schemas.metadata_columns(schemas.PAIRS) == []


def test_a_metadata_column_steps_aside_for_a_tables_own():
    assert schemas.names_beside(["topic", "prompt"], ["prompt", "pair_id"]) == {
        "topic": "topic",
        "prompt": "row_prompt",
    }
    names = schemas.names_beside(["prompt", "row_prompt"], ["prompt"])
    assert names["prompt"] != names["row_prompt"]
