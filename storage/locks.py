"""A lock between the processes of one machine: a file that the kernel unlocks when they die."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def file_lock(path: Path, on_wait: Callable[[], None] | None) -> Iterator[bool]:
    """Hold the lock while the context is open; the file is gone afterwards.

    Args:
        path: the lock file.
        on_wait: called once before waiting for another holder; None does not wait.

    Yields:
        Whether the lock is held; always, where it waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held = _acquire(path, on_wait)
    try:
        yield held is not None
    finally:
        if held is not None:
            path.unlink(missing_ok=True)
            held.close()


def _acquire(path: Path, on_wait: Callable[[], None] | None) -> IO[Any] | None:
    told = False
    while True:
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is None:
                stream.close()
                return None
            if not told:
                on_wait()
                told = True
            fcntl.flock(stream, fcntl.LOCK_EX)
        # The holder before us removed the file: what we locked must be what is there now.
        if _same_file(stream, path):
            return stream
        stream.close()


def _same_file(stream: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False
