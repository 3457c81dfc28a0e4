"""Columns that the method computes, as Arrow tables of the store's schemas."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from fpo_core.lists import Lists


def to_table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """A table of columns: arrays, ``Lists``, or lists of structs as a mapping.

    Args:
        columns: by name; of a list of structs, its fields' arrays and ``offsets``.
        schema: of the table.
    """
    return pa.table([_column(columns[field.name], field.type) for field in schema], schema=schema)


def _column(column: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(column, Lists):
        return column.to_arrow()
    if isinstance(column, Mapping):
        fields = list(kind.value_type)
        values = [pa.array(column[field.name], field.type) for field in fields]
        structs = pa.StructArray.from_arrays(values, fields=fields)
        return pa.ListArray.from_arrays(pa.array(column["offsets"], pa.int32()), structs, type=kind)
    return pa.array(column, kind)
