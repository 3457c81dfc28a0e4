"""Progress of long work: a bar with rate and time left in a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

log = logging.getLogger("fpo.progress")

LINE_EVERY_SECONDS = 15.0

_watchers: "list[Callable[[Progress], None]]" = []


@contextmanager
def watched(watcher: "Callable[[Progress], None]") -> Iterator[None]:
    """Call a function at each advance of any work within."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class Progress:
    """Counts work towards a total and shows it; a context manager.

    Args:
        label: what is being done.
        total: amount of work, in ``unit``; None where only doing it will tell.
        unit: singular noun of what is counted.
        done: what an earlier run had finished.
    """

    def __init__(self, label: str, *, total: int | None, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self._began_at = done
        self._start = self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first advance came, and done then
        self._bar: RichProgress | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("  {task.description:<22}"),
                BarColumn(bar_width=28),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.add_task(self.label, total=self.total, completed=self.done, rate="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units a second in this run; what came before the first of them (start-up) left out."""
        if self._first is None or self.done == self._first[1]:
            return (self.done - self._began_at) / max(self.seconds, 1e-9)
        since, done = self._first
        return (self.done - done) / max(time.monotonic() - since, 1e-9)

    def advance(self, amount: int, note: str = "") -> None:
        """Count work as done.

        Args:
            amount: units finished since the last call.
            note: a short remark to show beside the rate, such as the current loss.
        """
        self.done += amount
        if self._first is None:
            self._first = time.monotonic(), self.done
        for watcher in _watchers:
            watcher(self)
        rate = f"{human_rate(self.rate, self.unit)} {note}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, rate=rate)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY_SECONDS and self.done != self.total:
            self._last_line = now
            log.info("%s: %s", self.label, self._line(rate.strip()))

    def _line(self, rate: str) -> str:
        if self.total is None:
            return f"{self.done} {self.unit}s, {rate}"
        left = (self.total - self.done) / max(self.rate, 1e-9)
        share = 100 * self.done / max(self.total, 1)
        return (
            f"{self.done} of {self.total} {self.unit}s ({share:.0f} %), {rate}, "
            f"about {left:.0f} s left"
        )


def human_rate(rate: float, unit: str) -> str:
    """A rate for people: units a second, or seconds a unit where that is more than one."""
    if 0 < rate < 1:
        return f"{1 / rate:.1f} s/{unit}"
    return f"{rate:,.1f} {unit}s/s" if rate < 20 else f"{rate:,.0f} {unit}s/s"


def not_shown(_amount: int) -> None:
    """The progress callback of a caller that shows none."""
