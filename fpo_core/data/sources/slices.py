"""Slices of a source, written and rounded as the `datasets` library does: ``train[:10%]``."""

import glob
import re
from pathlib import Path
from typing import NamedTuple

from fpo_core.errors import FPOError

_SLICE = re.compile(
    r"(?P<base>.+)\[((?P<start>-?\d+)(?P<start_percent>%)?)?:((?P<stop>-?\d+)(?P<stop_percent>%)?)?\]"
)


class Slice(NamedTuple):
    """A range of rows, in rows or in percent of all rows.

    Attributes:
        start: first row; None for the first of all. A negative one counts from the end.
        stop: row after the last; None for the end. A negative one counts from the end.
        percent: whether both are percentages.
    """

    start: int | None
    stop: int | None
    percent: bool

    def __str__(self) -> str:
        """Return the slice as a source names it; equal slices have equal text."""
        unit = "%" if self.percent else ""
        ends = ("" if end is None else f"{end}{unit}" for end in (self.start, self.stop))
        return f"[{':'.join(ends)}]"

    @property
    def needs_count(self) -> bool:
        """Return whether the number of all rows decides which rows are meant."""
        return self.percent or min(self.start or 0, self.stop or 0) < 0

    def bounds(self, num_rows: int) -> range:
        """Return the positions of the rows meant.

        Args:
            num_rows: rows of the whole source.
        """
        return range(num_rows)[slice(self._at(self.start, num_rows), self._at(self.stop, num_rows))]

    def _at(self, end: int | None, num_rows: int) -> int | None:
        if end is None or not self.percent:
            return end
        return round(end * num_rows / 100)  # `datasets` rounds to the closest row, half to even


def split_slice(source: str) -> tuple[str, Slice | None]:
    """Split a source into what it names and the slice of it.

    A path that exists is taken as it is, and a glob has no slice: its brackets are characters to
    match.

    Args:
        source: the source as a recipe names it.

    Returns:
        The name without the slice, and the slice or None.

    Raises:
        FPOError: one end is a percentage and the other a number of rows.
    """
    match = _SLICE.fullmatch(source)
    if not match or Path(source).expanduser().exists() or is_glob(match["base"]):
        return source, None
    start, stop = (int(end) if (end := match[name]) else None for name in ("start", "stop"))
    percents = {
        bool(match[f"{name}_percent"]) for name in ("start", "stop") if match[name] is not None
    }
    if len(percents) > 1:
        raise FPOError(
            f"data {source!r}: one end of the slice is in percent and the other in rows. Write "
            f"both in one unit, such as [10%:20%] or [100:200]"
        )
    return match["base"], Slice(start, stop, True in percents)


def is_glob(source: str) -> bool:
    """Return whether a source is a pattern: the question mark of a web address is none."""
    return glob.has_magic(source) and not source.startswith(("http://", "https://"))
