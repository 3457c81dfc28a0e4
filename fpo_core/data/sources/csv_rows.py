"""Rows of CSV and TSV files: the first line names the columns, every value is text."""

import csv
import io
import sys
from collections.abc import Iterator

from fpo_core.data.sources.compression import open_bytes
from fpo_core.data.sources.kinds import not_utf8_byte
from fpo_core.data.sources.row import DataFile, Row, faulty
from fpo_core.errors import FPOError

_LONGEST_NAME = 100  # characters; a longer name of a column is a text, so a header is missing


def csv_rows(file: DataFile, delimiter: str) -> Iterator[Row]:
    """Stream the rows of a file of separated values.

    Args:
        file: the file to read.
        delimiter: what separates the columns.

    Yields:
        Rows, with a fault where a row has another number of values than there are columns.

    Raises:
        FPOError: the header or the quotes are wrong, or the file is not UTF-8 (with line).
    """
    csv.field_size_limit(sys.maxsize)  # the default refuses texts of over 128 KiB
    with open_bytes(file) as stream:
        reader = csv.reader(_text_lines(stream, file.name), delimiter=delimiter, strict=True)
        names = _next(reader, f"{file.name}, line 1")
        if names is None:
            return
        _check_header(names, delimiter, file.name)
        while True:
            where = f"{file.name}, line {reader.line_num + 1}"
            values = _next(reader, where)
            if values is None:
                return
            if len(values) != len(names):
                detail = f"{len(values)} values, expected {len(names)} as in the first line"
                yield faulty(where, "wrong_fields", detail)
            else:
                yield Row(dict(zip(names, values, strict=True)), where)


def _text_lines(stream: io.BufferedReader, name: str) -> Iterator[str]:
    for number, raw in enumerate(stream, start=1):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise not_utf8_byte(name, number, error) from error
        yield line.removeprefix("\ufeff") if number == 1 else line


def _next(reader: Iterator[list[str]], where: str) -> list[str] | None:
    """Return the next line's values, None at the end; blank lines are skipped."""
    try:
        return next((values for values in reader if values), None)
    except csv.Error as error:
        raise FPOError(
            f"{where}: not CSV ({error}). Put double quotes around a value that holds quotes or "
            f"newlines, and double each quote within"
        ) from error


def _check_header(names: list[str], delimiter: str, name: str) -> None:
    remedy = "The first line has to name the columns, such as prompt,chosen,rejected"
    repeated = sorted({one for one in names if names.count(one) > 1})
    if repeated:
        raise FPOError(f"{name}: two columns are named {repeated[0]!r}. Rename one of them")
    texts = [one for one in names if len(one) > _LONGEST_NAME or "\n" in one]
    if texts:
        raise FPOError(f"{name}, line 1: {texts[0]:.40}... is no name of a column. {remedy}")
    other = next((one for one in (";", "\t", "|", ",") if one in names[0]), None)
    if len(names) == 1 and other:
        raise FPOError(
            f"{name}, line 1: columns are separated by {other!r}, expected {delimiter!r}. Save it "
            f"with {delimiter!r}" + ("" if other != "\t" else ", or name it .tsv")
        )
