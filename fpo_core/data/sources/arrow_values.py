"""Rows of Arrow record batches as Python values, the way JSON would have them.

Arrow gives every struct of a column the same fields and fills in nulls; these mean that the field
is absent, and are left out at every level. Times become text and decimals numbers.
"""

from collections.abc import Iterator
from typing import Any

from fpo_core.data.sources.row import Row, RowFault
from fpo_core.errors import FPOError


def batch_rows(batch: Any, name: str, first: int) -> Iterator[Row]:
    """Give the rows of a record batch.

    Args:
        batch: the pyarrow record batch.
        name: the file's name.
        first: number of its first row.

    Yields:
        Rows, with a fault where a value cannot be read.
    """
    columns = {field.name: _plain(batch.column(index)) for index, field in enumerate(batch.schema)}
    try:
        values = {key: _values(column) for key, column in columns.items()}
    except (ValueError, KeyError, OverflowError):
        for index in range(batch.num_rows):
            where = f"{name}, row {first + index}"
            one = {key: column.slice(index, 1) for key, column in columns.items()}
            yield _row_of_one(one, where)
        return
    keys = list(values)
    for index, row in enumerate(zip(*values.values(), strict=True)):
        yield _row(dict(zip(keys, row, strict=True)), f"{name}, row {first + index}")


def check_columns(schema: Any, name: str) -> None:
    """Refuse two columns, or two fields of a struct, that share a name.

    Args:
        schema: the pyarrow schema.
        name: the file's name.

    Raises:
        FPOError: naming the column.
    """
    for path, names in _levels(schema):
        repeated = sorted({one for one in names if names.count(one) > 1})
        if repeated:
            column = ".".join([*path, repeated[0]])
            raise FPOError(
                f"{name}: two columns are named {column!r}. Rename or remove one of them"
            )


def _levels(schema: Any) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Yield the names at every level of nesting, with the path to it."""
    import pyarrow.types as kinds

    yield (), list(schema.names)
    waiting = [((field.name,), field.type) for field in schema]
    while waiting:
        path, kind = waiting.pop()
        fields = [kind.field(index) for index in range(kind.num_fields)]
        if kinds.is_struct(kind):
            yield path, [field.name for field in fields]
            waiting += [((*path, field.name), field.type) for field in fields]
        else:
            waiting += [(path, field.type) for field in fields]


def _plain(column: Any) -> Any:
    """Cast what JSON has no type for."""
    import pyarrow as pa
    import pyarrow.types as kinds

    kind = column.type
    if kinds.is_decimal(kind):
        return column.cast(pa.float64(), safe=False)
    if kinds.is_temporal(kind) and not kinds.is_interval(kind):
        whole = kinds.is_duration(kind)
        return column.cast(pa.int64()) if whole else column.cast(pa.string())
    return column


def _values(column: Any) -> list[Any]:
    values = column.to_pylist(maps_as_pydicts="strict")
    return [_without_nulls(value) for value in values] if _has_inner_nulls(column) else values


def _has_inner_nulls(column: Any) -> bool:
    """Return whether a value may hold a field that is null, or bytes; Arrow counts faster."""
    import pyarrow.types as kinds

    kind = column.type
    if kinds.is_struct(kind):
        fields = column.flatten()
        return any(
            field.null_count or _is_bytes(field) or _has_inner_nulls(field) for field in fields
        )
    if kinds.is_list(kind) or kinds.is_large_list(kind):
        inner = column.flatten()
        return _is_bytes(inner) or _has_inner_nulls(inner)
    return kind.num_fields > 0


def _is_bytes(column: Any) -> bool:
    import pyarrow.types as kinds

    return kinds.is_binary(column.type) or kinds.is_large_binary(column.type)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return _text_of(value) if isinstance(value, bytes) else value


def _text_of(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value  # an image within a message, say: its reader names it


def _row(value: dict[str, Any], where: str) -> Row:
    found: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, bytes):
            one = _text_of(one)
            if isinstance(one, bytes):
                return Row({}, where, RowFault("not_unicode", f"{key!r} has bytes, not UTF-8 text"))
        if one is not None:
            found[key] = one
    return Row(found, where)


def _row_of_one(columns: dict[str, Any], where: str) -> Row:
    """Return the row of columns of one value each; one of them may not be readable."""
    value: dict[str, Any] = {}
    for key, column in columns.items():
        try:
            (value[key],) = _values(column)
        except UnicodeDecodeError as error:
            fault = RowFault("not_unicode", f"{key!r} is not UTF-8 text ({error.reason})")
            return Row({}, where, fault)
        except KeyError:
            return Row({}, where, RowFault("duplicate_key", f"a map in {key!r} repeats a key"))
        except (ValueError, OverflowError) as error:
            return Row({}, where, RowFault("unreadable", f"{key!r} cannot be read ({error})"))
    return _row(value, where)
