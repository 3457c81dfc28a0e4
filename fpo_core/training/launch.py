"""Start the training workers and watch them: metrics as they come, no process left behind."""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fpo_core.errors import FPOError, Preempted
from fpo_core.training.checkpoint import is_complete
from fpo_core.training.failure import failure
from fpo_core.training.hosts import Hosts
from fpo_core.training.job import (
    ERROR_FILE,
    HELDOUT_FILE,
    LOG_FILES,
    METRICS_FILE,
    PREEMPTED_FILE,
    WARNINGS_FILE,
    TrainingJob,
)
from fpo_core.training.launcher import HostsLauncher, Launcher

log = logging.getLogger("fpo.stage")
JOB_FILE = "job.json"
POLL_SECONDS = 0.2
# On several hosts a sign of life may come late, through a network file system.
PATIENCE_SECONDS = 60.0


def run_workers(
    job: TrainingJob,
    ranks: int,
    on_step: Callable[[dict[str, Any]], None],
    on_checkpoint: Callable[[Path], None] = lambda _folder: None,
    on_heldout: Callable[[dict[str, Any]], None] = lambda _record: None,
    hosts: Hosts | None = None,
) -> None:
    """Run a training job to its end in worker processes.

    When this is interrupted, the workers are told to stop: they finish their step, save and leave;
    who is not gone after 28 seconds is killed.

    Args:
        job: the run; ``job.output`` is emptied of an earlier attempt's metrics.
        ranks: worker processes; with ``hosts``, as many as there are slots.
        on_step: called with every step's metrics as rank 0 writes them, with those before
            ``job.resume`` first.
        on_checkpoint: called with the folder of every checkpoint that is complete.
        on_heldout: called with every record on held-out pairs, as ``on_step`` is; the two come in
            the order of their steps.
        hosts: where the ranks run; None: on this machine.

    Raises:
        FPOError: with the worker's own message, or the end of its log when it crashed.
        Preempted: the workers were told to stop.
    """
    if hosts is None and torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise FPOError(
            f"resources.ranks={ranks}, but this machine has {torch.cuda.device_count()} GPUs"
        )
    job.output.mkdir(parents=True, exist_ok=True)
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in (ERROR_FILE.format(rank="*"), *LOG_FILES, WARNINGS_FILE, PREEMPTED_FILE):
        for file in job.output.glob(name):
            file.unlink()
    if hosts and job.patience is None:
        job = job.model_copy(update={"patience": PATIENCE_SECONDS})
    job_file = job.output / JOB_FILE
    job.save(job_file)
    env = _environment(job, ranks, hosts)
    if hosts:
        launcher = HostsLauncher(job, job_file, hosts, env)
    else:
        launcher = Launcher(job, job_file, ranks, env)
    seen: set[Path] = set()
    warnings = _Tail(job.output / WARNINGS_FILE)
    logs = {METRICS_FILE: on_step, HELDOUT_FILE: on_heldout}
    tails = {name: _Tail(job.output / name) for name in logs}
    try:
        running = True
        while running:
            running = launcher.running()
            _tell_of_records(tails, logs)
            for line in warnings.new_lines():
                log.warning("train: %s", line)
            _tell_of_checkpoints(job.checkpoints, seen, on_checkpoint)
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        code = launcher.end()
        _tell_of_checkpoints(job.checkpoints, seen, on_checkpoint)
    preempted = job.output / PREEMPTED_FILE
    if preempted.is_file():
        step = json.loads(preempted.read_text())["step"]
        raise Preempted(
            f"training was told to stop, after step {step}; the same command goes on from its last "
            f"checkpoint"
        )
    if code != 0:
        raise failure(job.output, code)


def _tell_of_records(
    tails: "dict[str, _Tail]", tell: dict[str, Callable[[dict[str, Any]], None]]
) -> None:
    """Pass new records on by step, a step's own before what was measured after it.

    The workers write them in that order and ``tails`` starts with the steps, so what comes later
    has no lower step.
    """
    new = [(name, json.loads(line)) for name, tail in tails.items() for line in tail.new_lines()]
    for name, record in sorted(new, key=lambda found: found[1]["step"]):
        tell[name](record)


def _tell_of_checkpoints(
    root: Path, seen: set[Path], on_checkpoint: Callable[[Path], None]
) -> None:  # fmt: skip
    for folder in sorted(root.glob("step-*")):
        if folder not in seen and is_complete(folder):
            seen.add(folder)
            on_checkpoint(folder)


def _environment(job: TrainingJob, ranks: int, hosts: Hosts | None) -> dict[str, str]:
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    # The workers import this very checkout, from whatever folder the command runs in.
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    if job.threads or hosts is None:  # other hosts have cores of their own
        # More threads than cores wait for each other in a loop: two ranks of two cores that took
        # both of them would be many times slower than one rank.
        env["OMP_NUM_THREADS"] = str(job.threads or max(1, torch.get_num_threads() // ranks))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    return env


class _Tail:
    """The whole lines that are added to a file, which may not be there yet.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def new_lines(self) -> Iterator[str]:
        """The lines since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            stream.seek(self._position)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield line.decode().rstrip("\n")
