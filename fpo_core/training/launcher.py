"""The process that starts the ranks: torch's on this machine, DeepSpeed's on several hosts.

On one machine the workers stay in this process's group, so Prefect's cancellation and Ctrl-C reach
them, and the kernel ends them when this process dies (parent-death signal), SIGKILL included. A
single rank needs no launcher, which would import torch first: three seconds until it starts.

No signal crosses to another host, and DeepSpeed's launcher must get none that it answers (see
``hosts.py``): it has a session of its own, and the ranks go by the stage's orders.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fpo_core.processes import end_with_parent
from fpo_core.training.hosts import Hosts, hosts_command, hosts_environment
from fpo_core.training.job import ERROR_FILE, LOG_FILE, TrainingJob
from fpo_core.training.orders import Orders

WORKER = "fpo_core.training.worker"
# For the workers to end their step and save; Prefect kills a cancelled run after 30 seconds.
GRACE_SECONDS = 28.0
# What a launcher says to the only rank; it listens at any port.
_ALONE = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
}  # fmt: skip
# For the other ranks of a run that has failed to say what they saw.
LAST_WORDS_SECONDS = 5.0
_HOST_FAILED = re.compile(rb"ssh exited with exit code [1-9]")


class Launcher:
    """The ranks of this machine: ``torch.distributed.run``, which picks a free port itself.

    Args:
        job: the run.
        job_file: where it was saved.
        ranks: worker processes.
        env: the workers' environment.
    """

    def __init__(
        self, job: TrainingJob, job_file: Path, ranks: int, env: Mapping[str, str]
    ) -> None:
        several = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        command = [sys.executable, "-m", *(several if ranks > 1 else ()), WORKER, str(job_file)]
        alone = _ALONE if ranks == 1 else {}
        self._start(job, command, env={**env, **alone}, preexec_fn=end_with_parent())

    def _start(self, job: TrainingJob, command: list[str], **options: Any) -> None:
        self._orders = Orders(job.output)
        with (job.output / LOG_FILE).open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                command, stdout=said, stderr=subprocess.STDOUT, **options
            )

    def running(self) -> bool:
        """Whether the ranks are at work."""
        return self._process.poll() is None

    def end(self) -> int:
        """Let the ranks finish their step, if they run; by force when it takes too long.

        Returns:
            The launcher's exit code.
        """
        try:
            if self._process.poll() is None:
                self._orders.stop()
                self._tell()
                try:
                    self._process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    self._kill()
            return self._process.wait()
        finally:
            self._orders.retire()

    def _tell(self) -> None:
        self._process.terminate()

    def _kill(self) -> None:
        self._process.kill()


class HostsLauncher(Launcher):
    """DeepSpeed's launcher with the ranks of several hosts.

    Args:
        job: the run.
        job_file: where it was saved.
        hosts: where the ranks run.
        env: the launcher's environment.
    """

    def __init__(
        self, job: TrainingJob, job_file: Path, hosts: Hosts, env: Mapping[str, str]
    ) -> None:
        self._output, self._failed_at = job.output, 0.0
        self._start(
            job, hosts_command(hosts, WORKER, job_file), env=hosts_environment(env, job.output),
            stdin=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGKILL),
        )  # fmt: skip

    def running(self) -> bool:
        """Whether the ranks are at work; False also some time after one of them failed.

        pdsh waits for all hosts, and on the others the ranks may wait long for the one that failed.
        """
        if not super().running():
            return False
        if not self._failed_at and self._one_failed():
            self._failed_at = time.monotonic()
        return not self._failed_at or time.monotonic() - self._failed_at < LAST_WORDS_SECONDS

    def _one_failed(self) -> bool:
        if any(self._output.glob(ERROR_FILE.format(rank="*"))):
            return True
        return _HOST_FAILED.search((self._output / LOG_FILE).read_bytes()) is not None

    def end(self) -> int:
        """As on one machine; when a rank has failed the others are not waited for again."""
        if self._failed_at and self._process.poll() is None:
            self._kill()
        return super().end()

    def _tell(self) -> None:
        """The orders do."""

    def _kill(self) -> None:
        # The launcher and pdsh, here. The ranks leave, for the orders are gone then.
        os.killpg(self._process.pid, signal.SIGKILL)
