"""Rows of JSON files: a row per line, one list of rows, or one object after the other.

Every layout is streamed: a list of rows is parsed element by element and never held as a whole.
"""

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from fpo_core.data.sources.compression import open_bytes
from fpo_core.data.sources.json_text import JsonParser, JsonText
from fpo_core.data.sources.kinds import data_suffix, not_utf8_byte
from fpo_core.data.sources.row import DataFile, Row
from fpo_core.errors import FPOError

_BOM = b"\xef\xbb\xbf"
_PEEK = 1 << 16
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"')
# Columns that hold lists of objects in a row; a mapping of splits has none of these keys.
_LIST_COLUMNS = {"chosen", "completion", "conversation", "conversations", "history", "messages"}
_LIST_COLUMNS |= {"prompt", "rejected", "tools"}


def json_rows(file: DataFile) -> Iterator[Row]:
    """Stream the rows of a JSON file, whatever its layout.

    Args:
        file: the file to read.

    Yields:
        Rows, with a fault where one row cannot be used.

    Raises:
        FPOError: the file is not JSON or not UTF-8 (with line), or maps splits to rows.
    """
    with open_bytes(file) as stream:
        layout = _layout(stream.peek(_PEEK), file)
        if layout == "list":
            yield from _list(stream, file.name)
        else:
            rows = _lines if layout == "lines" else _objects
            yield from _without_mapping(rows(stream, file.name), file.name)


def count_lines(file: DataFile) -> int | None:
    """Count the rows of a file that has one on each line, without parsing them.

    Args:
        file: the file to count.

    Returns:
        The number of rows; None where rows may be laid out otherwise.

    Raises:
        FPOError: the file cannot be read.
    """
    number = 0
    with open_bytes(file) as stream:
        for raw in stream:
            line = raw.strip().removeprefix(_BOM)
            if not line:
                continue
            if not (line.startswith(b"{") and line.endswith(b"}")):
                return None
            number += 1
    return number


def _layout(head: bytes, file: DataFile) -> str:
    """Tell from a file's beginning how its rows are laid out."""
    text = head.decode("utf-8", errors="replace").removeprefix("\ufeff").lstrip()
    is_list = text.startswith("[")
    if is_list and data_suffix(file.filename) == ".json":
        return "list"
    line, end, rest = text.partition("\n")
    try:
        JsonParser().row(line, file.name)
    except json.JSONDecodeError:
        if is_list:
            return "list"
        return "objects" if end and _opens_more(line) else "lines"
    return "list" if is_list and not rest.strip() else "lines"


def _opens_more(line: str) -> bool:
    """Return whether a line can be the first of an object that takes several lines."""
    bare = _STRING.sub("", line).strip()
    opened = sum(map(bare.count, "{[")) - sum(map(bare.count, "}]"))
    return opened > 0 and '"' not in bare and bare.endswith(("{", "[", ","))


def _lines(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    parser = JsonParser()
    for number, raw in enumerate(stream, start=1):
        if raw.isspace():
            continue
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise not_utf8_byte(name, number, error) from error
        where = f"{name}, line {number}"
        try:
            yield parser.row(text.removeprefix("\ufeff"), where)
        except json.JSONDecodeError as error:
            raise FPOError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error


def _objects(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    text, parser = JsonText(stream, name), JsonParser()
    while text.next_char():
        where = f"{name}, line {text.line}"
        yield text.row(parser, where)


def _list(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    text, parser = JsonText(stream, name), JsonParser()
    text.expect("[")
    number = 0
    if text.next_char() == "]":
        text.expect("]")
    else:
        while True:
            number += 1
            yield text.row(parser, f"{name}, row {number}")
            if text.expect(",]") == "]":
                break
    if text.next_char():
        text.fail("Extra data")


def _without_mapping(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """Pass rows on; refuse a file that is one object of splits or of columns."""
    first = next(rows, None)
    if first is None:
        return
    second = next(rows, None)
    if second is None:
        _refuse_mapping(first.value, name)
    yield first
    if second is not None:
        yield second
        yield from rows


def _refuse_mapping(value: dict[str, Any], name: str) -> None:
    keys = ", ".join(map(repr, value))
    if value and all(map(_is_rows, value.values())) and not _LIST_COLUMNS & value.keys():
        raise FPOError(
            f"{name}: one object that maps names to lists of rows: {keys}. Expected the rows of "
            f"one split; save each list as a file of its own"
        )
    if value and all(map(_is_column, value.values())):
        raise FPOError(
            f"{name}: one object of columns ({keys}), as pandas writes it. Expected rows; save it "
            f'with df.to_json(PATH, orient="records", lines=True)'
        )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_column(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(key.isdecimal() for key in value)
