"""Ranks on several hosts: the hostfile, and DeepSpeed's launcher that starts them through pdsh.

What the launcher does (0.19.8): it asks the first host by ssh for its address, and through pdsh
starts one ``deepspeed.launcher.launch`` a host, which starts that host's ranks. Of the environment
it passes on ``PYTHON*``, ``NCCL*`` (on GPUs) and the lines of a file, ours here. On SIGINT and
SIGTERM it runs ``pkill -f "python -u -m deepspeed.launcher.launch"`` on every host, which ends the
user's other DeepSpeed runs there too: so it is never sent one (see ``launch.py``).
"""

import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import ResourceSettings

_ENTRY = re.compile(r"(\S+)\s+slots=([1-9]\d*)(\s.*)?")
# What pdsh and the remote shell leave as it is.
_PLAIN = re.compile(r"[\w@+=:,./-]+")
_ENVIRONMENT_FILE = "environment"
_SETTINGS_OF_LIBRARIES = ("GLOO_", "NCCL_", "TORCH_")
_OUR_SETTINGS = ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")


class Host(NamedTuple):
    """One line of a hostfile."""

    name: str
    slots: int  # ranks that run there


class Hosts(NamedTuple):
    """Where the ranks of a run are started."""

    file: Path
    hosts: tuple[Host, ...]
    master_addr: str | None  # of rank 0; None: the first that `hostname -I` says on the first host
    master_port: int | None  # where rank 0 listens; None: one that is free here

    @property
    def ranks(self) -> int:
        """Ranks over all hosts."""
        return sum(host.slots for host in self.hosts)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The hosts of a hostfile: ``NAME slots=N`` a line, ``#`` comments.

    Raises:
        FPOError: it cannot be read, or a line is something else; naming file and line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FPOError(f"resources.hostfile: {str(path)!r} cannot be read ({error})") from error
    hosts: dict[str, Host] = {}
    for number, text in enumerate(lines, start=1):
        line = text.strip()
        if not line or line.startswith("#"):
            continue
        where = f"resources.hostfile: {path}, line {number}"
        entry = _ENTRY.fullmatch(line)
        if entry is None:
            raise FPOError(f"{where}: {line!r} is not `HOST slots=N`, N from 1")
        name = entry[1]
        if not _PLAIN.fullmatch(name) or "," in name:
            raise FPOError(f"{where}: {name!r} is not the name of a host")
        if name in hosts:
            raise FPOError(f"{where}: the host {name!r} is named a second time; add up its slots")
        hosts[name] = Host(name, int(entry[2]))
    if not hosts:
        raise FPOError(f"resources.hostfile: {path} names no host")
    return tuple(hosts.values())


def run_hosts(resources: ResourceSettings) -> Hosts | None:
    """The hosts of a recipe, checked; None where the ranks run on this machine.

    Raises:
        FPOError: a bad hostfile, other ranks than it has slots, or no pdsh here.
    """
    if resources.hostfile is None:
        return None
    path = Path(resources.hostfile).expanduser().resolve()
    found = Hosts(path, read_hostfile(path), resources.master_addr, resources.master_port)
    if resources.ranks not in (None, found.ranks):
        raise FPOError(
            f"resources.ranks={resources.ranks}, but {path} has {found.ranks} slots; make them "
            f"agree, or leave resources.ranks out (null)"
        )
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise FPOError(
                f"resources.hostfile: DeepSpeed starts ranks on other hosts with {program}, which "
                f"is not installed here (Debian: apt-get install pdsh openssh-client)"
            )
    return found


def hosts_command(hosts: Hosts, module: str, job_file: Path) -> list[str]:
    """The command that starts the ranks on all hosts, in this process's working folder.

    Raises:
        FPOError: a path that pdsh would take apart.
    """
    paths = {
        "Python": sys.executable,
        "the working folder": Path.cwd(),
        "the store's work in progress": job_file,
    }
    for what, path in paths.items():
        if not _PLAIN.fullmatch(str(path)):
            raise FPOError(
                f"resources.hostfile: {what} is at {str(path)!r}; a path with such characters does "
                f"not get through pdsh to other hosts"
            )
    address = [f"--master_addr={hosts.master_addr}"] if hosts.master_addr else []
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hosts.file}",
        "--force_multi", "--no_local_rank", *address,
        f"--master_port={hosts.master_port or _free_port()}", "--module", module,
        str(job_file.resolve()),
    ]  # fmt: skip


def hosts_environment(env: Mapping[str, str], output: Path) -> dict[str, str]:
    """The launcher's environment, by which the ranks' on every host is as it would be here.

    Credentials are none of it: it is seen in the hosts' process lists. What the user has in
    ``.deepspeed_env`` is passed on as DeepSpeed would.
    """
    name = env.get("DS_ENV_FILE", ".deepspeed_env")
    theirs = [Path(folder).expanduser() / name for folder in ("~", ".")]
    lines = [
        line
        for file in dict.fromkeys(path.resolve() for path in theirs)
        if file.is_file()
        for line in file.read_text().splitlines()
        if "=" in line
    ]
    ours = [
        f"{key}={value}"
        for key, value in sorted(env.items())
        if key.startswith(_SETTINGS_OF_LIBRARIES) or key in _OUR_SETTINGS
    ]
    passed = output / _ENVIRONMENT_FILE
    passed.touch(mode=0o600)  # what theirs holds is not for others
    passed.write_text("".join(line + "\n" for line in (*ours, *lines)))
    return {**env, "DS_ENV_FILE": str(passed.resolve())}


def _free_port() -> int:
    """A port that nobody listens on here; that it is free on the first host too is likely."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
