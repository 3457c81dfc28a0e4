"""Prefect's temporary server, started so that it stops when we do and only then."""

import functools
import subprocess
import types

from fpo_core.processes import end_with_parent


def contain_prefect_server() -> None:
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
