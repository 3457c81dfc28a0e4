"""Prefect's temporary server, started so that it stops when we do and only then."""

import atexit
import functools
import signal
import subprocess
import types
from collections.abc import Iterator
from contextlib import contextmanager

from fpo_core.processes import end_with_parent


@contextmanager
def contained_prefect_server() -> Iterator[None]:
    """Have Prefect start its server in a session of its own, tied to the life of this process.

    As Prefect starts it, Ctrl-C in a terminal ends the server before the run, which then waits for
    it in vain; and a run that is killed leaves it behind. Prefect has no setting for either. Where
    ``PREFECT_API_URL`` names a server, Prefect starts none, and this changes nothing.
    """
    from prefect.server.api import server

    popen = functools.partial(
        subprocess.Popen, start_new_session=True, preexec_fn=end_with_parent()
    )
    server.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    try:
        yield
    finally:
        # All is done, and the server takes a moment to end: Ctrl-C would only break into that.
        # Registered last, so this comes before Prefect's own step at exit.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
