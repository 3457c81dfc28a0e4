"""Child processes that do not outlive their parent."""

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> Callable[[], None] | None:
    """A ``preexec_fn`` by which the kernel ends the child when its parent is gone, even by SIGKILL.

    Strictly: when the *thread* that started the child ends. None where the system cannot do it.
    """
    return _ask_for_signal if sys.platform == "linux" else None


def _ask_for_signal() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
