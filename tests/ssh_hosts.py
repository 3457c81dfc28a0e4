"""Two "hosts" on this machine: a private sshd on the loopback, reached under two names."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory) -> Iterator[Path]:
    """A hostfile of two hosts with one slot each; ``ssh`` and ``pdsh`` find the way to them.

    Keys, configuration and daemon are this fixture's own: nobody's ``~/.ssh`` is read or written.
    """
    if SSHD is None or not shutil.which("pdsh") or not shutil.which("ssh"):
        pytest.skip("sshd, ssh or pdsh is not installed (openssh-server, pdsh)")
    folder = tmp_path_factory.mktemp("ssh")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    for key in ("host", "user"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key]
        subprocess.run(keygen, check=True)
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
        f"PasswordAuthentication no\nPermitRootLogin yes\nMaxStartups 50\n"
    )
    (folder / "config").write_text(
        f"Host *\n HostName 127.0.0.1\n Port {port}\n User {getpass.getuser()}\n"
        f" IdentityFile {folder}/user\n IdentitiesOnly yes\n StrictHostKeyChecking no\n"
        f" UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
    )
    ssh = folder / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    ssh.chmod(0o755)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it separates its privileges
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"],
                              stderr=(folder / "sshd.log").open("wb"))  # fmt: skip
    hostfile = folder / "hostfile"
    hostfile.write_text("# two names of this machine\none slots=1\ntwo slots=1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
        try:
            _wait_for(["ssh", "two", "true"], folder / "sshd.log")
            yield hostfile
        finally:
            daemon.terminate()
            daemon.wait(10)


def _wait_for(command: list[str], log: Path) -> None:
    deadline = time.monotonic() + 20
    while subprocess.run(command, capture_output=True).returncode:
        if time.monotonic() > deadline:
            pytest.fail(f"sshd does not let us in: {log.read_text()[-500:]}")
        time.sleep(0.2)
