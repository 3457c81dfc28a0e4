"""Makes .venv as the lock files say; when that is done already, says nothing and returns at once.

One file in .venv tells its state: "unfinished" while we work on it, then a fingerprint of all that
decided its content. So a set-up that was cut short starts over, a changed lock is installed on top,
and an unchanged one costs three small reads and one start of Python. Standard library only, and it
runs on Python 3.6 as far as it takes to say that 3.6 is too old.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

Version = Tuple[int, int]

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STATE = VENV / ".set-up"
LOG = VENV / "set-up.log"
PYPROJECT = ROOT / "pyproject.toml"
LOCK = ROOT / "requirements.lock"
NODEPS_LOCK = ROOT / "requirements-nodeps.lock"

UNFINISHED = "unfinished\n"
BUILD_TOOLS = ("pip", "setuptools", "wheel")
FIRST_TO_TRY = ("python3", "python3.11", "python3.12", "python3.13")

NO_CONNECTION = re.compile(
    r"Retrying \(|Could not fetch URL \S+: (?!404)|NewConnectionError|NameResolutionError"
    r"|ProxyError|ReadTimeoutError|SSLError|ConnectionResetError|ProtocolError|IncompleteRead"
)
NOT_FOUND = re.compile(r"version that satisfies the requirement (\S+).*from versions: ([^)]*)")
NO_SPACE = re.compile(r"No space left on device|Errno 28|Disk quota exceeded")
DISK_FULL = (
    "the disk is full: free some space (the environment takes about 3 GB, more with CUDA, and pip "
    "needs room in TMPDIR too), then run the same command again."
)


class SetupError(Exception):
    """What went wrong and what to do about it, in one sentence for the user."""


# ---- which Python ------------------------------------------------------------------------------


def supported_range() -> Tuple[Version, Version]:
    """The lowest supported version and the first one that is not any more, from pyproject.toml."""
    declared = r'requires-python = ">=3\.(\d+),<3\.(\d+)"'
    lowest, end = re.findall(declared, PYPROJECT.read_text(encoding="utf-8"))[0]
    return (3, int(lowest)), (3, int(end))


def is_supported(version: Version) -> bool:
    lowest, end = supported_range()
    return lowest <= version < end


def python_version(program: object) -> Optional[Version]:
    """The version of a Python, or None when it does not run."""
    ask = [str(program), "-S", "-E", "-c", "import sys; print('%d %d' % sys.version_info[:2])"]
    try:
        # Not check_output(text=True): Python 3.6 does not know it.
        answer = subprocess.check_output(ask, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        major, minor = answer.split()
        return int(major), int(minor)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def find_python() -> Tuple[str, Version]:
    """The Python to make .venv of: PYTHON if set, else the first supported one on the PATH."""
    override = os.environ.get("PYTHON")
    # An activated .venv stands first on the PATH; it cannot be what it is made of.
    folders = [folder for folder in os.get_exec_path() if Path(folder) != VENV / "bin"]
    unsupported = {}
    for name in [override] if override else FIRST_TO_TRY:
        program = shutil.which(name, path=os.pathsep.join(folders))
        version = python_version(program) if program else None
        if program and version:
            if is_supported(version):
                return program, version
            unsupported[program] = f"{program} is Python {version[0]}.{version[1]}"
    lowest, end = supported_range()
    raise SetupError(
        f"this project needs Python 3.{lowest[1]} to 3.{end[1] - 1}, and there is none on the PATH"
        f"{''.join('; ' + found for found in unsupported.values())}: install one of them, or name "
        f"it, as in PYTHON=/path/to/python3.{lowest[1]}."
    )


# ---- what state .venv is in --------------------------------------------------------------------


def fingerprint(version: Version) -> str:
    """Digest of what decides the content of .venv: its place, its Python, both locks, pyproject."""
    digest = hashlib.sha256(f"{VENV} {version}".encode())
    for path in (PYPROJECT, LOCK, NODEPS_LOCK):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest() + "\n"


def read_state() -> Optional[str]:
    return STATE.read_text(encoding="ascii") if STATE.exists() else None


def write_state(text: str) -> None:
    partial = STATE.with_name(STATE.name + ".partial")
    partial.write_text(text, encoding="ascii")
    os.replace(str(partial), str(STATE))


def usable_version() -> Optional[Version]:
    """The version of the Python in .venv, or None when .venv has to be made anew."""
    version = python_version(VENV_PYTHON)
    if version is None or read_state() == UNFINISHED or not is_supported(version):
        return None
    if os.environ.get("PYTHON") and find_python()[1] != version:
        return None
    return version


# ---- running pip, and saying what went wrong ---------------------------------------------------


def child_environment() -> Dict[str, str]:
    """Ours, less what leads pip out of .venv, with DeepSpeed told to build none of its kernels."""
    dropped = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    kept.update(PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", DS_BUILD_OPS="0")
    return kept


def run(command: Sequence[object], lock_fd: int) -> Tuple[int, str]:
    """Runs a command, its output going to the log; returns its exit status and that output.

    The child inherits the set-up's lock: should we be killed, the next set-up waits for its end.
    """
    with LOG.open("ab") as log:
        start = log.seek(0, os.SEEK_END)
        child = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=child_environment(),
            cwd=str(ROOT),
            pass_fds=[lock_fd],
        )
        try:
            status = child.wait()
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    with LOG.open("rb") as log:
        log.seek(start)
        return status, log.read().decode("utf-8", "replace")


def pip_install(arguments: List[Any], lock_fd: int) -> None:
    pip = [VENV_PYTHON, "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    status, output = run([*pip, *arguments], lock_fd)
    if status == 0:
        return
    missing = NOT_FOUND.search(output)
    if missing and missing.group(2) == "none":
        # An index that did not answer reads like one without the package; -vv tells them apart.
        output += run([*pip, "-vv", "--dry-run", "--no-deps", missing.group(1)], lock_fd)[1]
    raise SetupError(explain(output))


def explain(output: str) -> str:
    """One sentence with the remedy for the output of a pip or venv that failed."""
    missing = NOT_FOUND.search(output)
    offline = NO_CONNECTION.search(output)
    if NO_SPACE.search(output) or shutil.disk_usage(str(ROOT)).free < 1 << 24:
        return DISK_FULL
    if offline and (not missing or missing.group(2) == "none"):
        return (
            "the package index cannot be reached: check the network, or the proxy and index in "
            "pip's configuration (pip config list), then run the same command again."
        )
    if missing:
        return (
            f"the package index has no {missing.group(1)} for this Python and platform (it offers: "
            f"{missing.group(2)}): try another supported Python (PYTHON=...), or make a new lock "
            "with `make lock`."
        )
    errors = [line.strip() for line in output.splitlines() if "error" in line.lower()]
    reason = errors[-1] if errors else "no reason given"
    return f"installing failed ({reason}): the whole story is in {LOG.relative_to(ROOT)}."


# ---- the set-up itself -------------------------------------------------------------------------


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Prints a line: what is being done, then the seconds that it took."""
    print(f"  {name} ... ", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print("not done", file=sys.stderr)
        raise
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)


def create_venv(python: str, lock_fd: int) -> None:
    if VENV.exists():
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    write_state(UNFINISHED)
    status, output = run([python, "-m", "venv", VENV], lock_fd)
    if status and ("ensurepip is not available" in output or "No module named" in output):
        raise SetupError(
            f"{python} has no venv module: install the package python3-venv (Debian, Ubuntu: "
            "apt-get install python3-venv), or name another Python with PYTHON=/path/to/python3."
        )
    if status:
        raise SetupError(explain(output))


def steps() -> Iterator[Tuple[str, List[Any]]]:
    """What to install, in order: (what to call it, pip's arguments).

    torch goes before the rest because DeepSpeed's build imports it, which is also why builds are
    not isolated. Where packages come from is left to pip's own configuration.
    """
    pins = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line]
    build_tools = [pin for pin in pins if pin.partition("==")[0] in BUILD_TOOLS]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    if build_tools:
        yield "pip and build tools", build_tools
    if torch:
        yield f"{torch[0]}, the largest download", ["--constraint", LOCK, *torch]
    rest = len(pins) - len(build_tools) - len(torch)
    yield f"{rest} packages", ["--no-build-isolation", "--requirement", LOCK]
    yield "the quickstart's model, IFEval's sentences", ["--no-deps", "--requirement", NODEPS_LOCK]
    yield "this project", ["--no-deps", "--no-build-isolation", "--editable", ROOT]


def install(lock_fd: int, fresh: bool) -> None:
    # In a fresh environment byte code is made at the end, on all cores, and pip makes none: faster.
    # The libraries' own tests get none; a file that does not compile is no matter.
    options = ["--no-compile"] if fresh else []
    for name, arguments in steps():
        with timed(name):
            pip_install([*options, *arguments], lock_fd)
    if fresh:
        with timed("byte code"):
            what = ["-j", "0", "-x", "/tests?/", VENV / "lib"]
            run([VENV_PYTHON, "-m", "compileall", "-q", "-q", *what], lock_fd)


def set_up(lock_fd: int) -> None:
    version = usable_version()
    if version and read_state() == fingerprint(version):
        return
    start = time.monotonic()
    fresh = version is None
    if version:
        print("set-up: bringing .venv in line with the lock", file=sys.stderr)
        write_state(UNFINISHED)
    else:
        python, version = find_python()
        print(f"set-up: making .venv with {python}, once; some minutes", file=sys.stderr)
        with timed("empty environment"):
            create_venv(python, lock_fd)
    install(lock_fd, fresh)
    write_state(fingerprint(version))
    print(f"set-up: done in {time.monotonic() - start:.0f} s", file=sys.stderr)


def wait_for_turn(lock_fd: int) -> None:
    """One set-up at a time in this tree."""
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("set-up: waiting for another set-up of this folder", file=sys.stderr)
        fcntl.flock(lock_fd, fcntl.LOCK_EX)


def continue_with_supported_python() -> None:
    """Starts over under a supported Python when the one that runs this is not."""
    if not is_supported(sys.version_info[:2]):
        python, _ = find_python()
        os.execv(python, [python, *sys.argv])


def fail(reason: object) -> int:
    print(f"set-up: {reason}", file=sys.stderr)
    return 2


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        continue_with_supported_python()
        with PYPROJECT.open() as lock:
            wait_for_turn(lock.fileno())
            set_up(lock.fileno())
    except SetupError as error:
        return fail(error)
    except KeyboardInterrupt:
        fail("interrupted; the next run starts over.")
        return 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return fail(DISK_FULL if full else f"{error.filename}: {error.strerror}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
