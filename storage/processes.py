"""Who a process is, so that another one on the same machine can tell that it is gone."""

import os
from pathlib import Path

_BOOT, _NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), "/proc/self/ns/pid"


def this_process() -> str | None:
    """Boot, pid namespace, pid and start time; None where the system does not tell (not Linux)."""
    return _identity(os.getpid())


def is_gone(identity: str | None) -> bool:
    """Whether the process is known to have ended. One on another machine is never known to."""
    here = this_process()
    if identity is None or here is None:
        return False
    place, _, process = identity.rpartition(" ")
    if place != here.rpartition(" ")[0]:
        return False
    pid = int(process.partition(":")[0])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, and alive
    found = _identity(pid)  # None where another user's processes are hidden: then it may be alive
    return found is not None and found != identity


def _identity(pid: int) -> str | None:
    try:
        boot = _BOOT.read_text().strip()
        namespace = os.readlink(_NAMESPACE)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name in parentheses may hold anything; field 3 (the state) comes after it.
    fields = stat.rpartition(")")[2].split()
    # Z and X: ended, and only not yet waited for.
    started = "ended" if fields[0] in "ZX" else fields[19]
    return f"{boot} {namespace} {pid}:{started}"
