"""One row of a source, and the faults that leave out a single row."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

Reason = Literal[
    "duplicate_key", "not_unicode", "too_deep", "not_an_object", "wrong_fields", "unreadable"
]


class RowFault(NamedTuple):
    """Why a row cannot be used, though its file can.

    Attributes:
        reason: a word to count rows by.
        detail: the fault of this row, for people.
    """

    reason: Reason
    detail: str


class Row(NamedTuple):
    """One row of a source.

    Attributes:
        value: the row's columns; empty where it has a fault.
        where: file and line or row, such as "file.jsonl, line 3".
        fault: why the row cannot be used; None for a sound row.
    """

    value: dict[str, Any]
    where: str
    fault: RowFault | None = None


class DataFile(NamedTuple):
    """One file to read.

    Attributes:
        path: where its content is on this machine.
        name: its name in messages, relative to what the user wrote.
        filename: the name whose suffix tells the kind of file.
    """

    path: Path
    name: str
    filename: str


def faulty(where: str, reason: Reason, detail: str) -> Row:
    """Return a row that only says why it cannot be used."""
    return Row({}, where, RowFault(reason, detail))
