"""Child processes that do not outlive their parent."""

import ctypes
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> Callable[[], None] | None:
    """A ``preexec_fn`` by which the kernel ends the child when its parent is gone, even by SIGKILL.

    Strictly: when the *thread* that started the child ends. None where the system cannot do it.

    Args:
        number: the signal that the child gets.
    """

    def ask_for_signal() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)

    return ask_for_signal if sys.platform == "linux" else None
