"""The stage's word to the ranks on whatever host they are: stop after this step; I am still here.

One file in the job's output folder, which every host of a run has to see. Its first line names the
attempt, a second one asks the ranks to stop, and its time is the stage's sign of life. It is opened
to look, never only looked for: a network file system may remember for a minute that a name was
not there, but asks again when it opens a file.
"""

import logging
import math
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("fpo.worker")
ORDERS_FILE = "orders"
BEAT_SECONDS = 5.0
LOOK_SECONDS = 1.0
_STOP = "stop"
_MOST_MISSES = 3  # in a row, for a file that another process replaces


class Orders:
    """The stage's side.

    Args:
        output: the job's output folder.
    """

    def __init__(self, output: Path) -> None:
        self._file = output / ORDERS_FILE
        self._file.write_text(uuid.uuid4().hex + "\n")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="orders", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the ranks to finish their step, save it and leave."""
        with suppress(FileNotFoundError), self._file.open("r+") as stream:
            if _STOP not in stream.read().splitlines():
                stream.write(_STOP + "\n")

    def retire(self) -> None:
        """No sign of life any more: ranks that wait for it leave at once."""
        self._ended.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # a file system that is away for a while
                os.utime(self._file)


def told_to_stop(output: Path) -> bool:
    """Whether the stage has asked the ranks to stop."""
    try:
        return _STOP in (output / ORDERS_FILE).read_text().splitlines()
    except OSError:
        return False


def leave_with_the_stage(output: Path, patience: float | None) -> None:
    """End this process when the stage is gone, from a thread that looks once a second.

    The ranks leave at once when the file is gone, or is of another attempt.

    Args:
        output: the job's output folder.
        patience: seconds that they wait for a sign of life; None: as long as the file is there.
    """
    most = math.inf if patience is None else patience / LOOK_SECONDS
    watch = threading.Thread(target=_watch, args=(output / ORDERS_FILE, most), daemon=True)
    watch.start()


def _watch(file: Path, most_silent: float) -> None:
    """Counts looks, not time: a process that was suspended has not waited."""
    attempt, beat, misses, silent = None, 0, 0, 0
    while misses < _MOST_MISSES and silent < most_silent:
        silent += 1
        try:
            with file.open() as stream:
                found, time_of = stream.readline(), os.fstat(stream.fileno()).st_mtime_ns
        except FileNotFoundError:
            misses += 1
        except OSError:
            pass  # the file system is away: patience
        else:
            misses = 0
            attempt = attempt or found
            if found != attempt:
                break
            if time_of != beat:
                beat, silent = time_of, 0
        time.sleep(LOOK_SECONDS)
    log.error("the train stage is gone: this rank leaves, without saving")
    os._exit(1)
