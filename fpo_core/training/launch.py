"""Start the training workers and watch them: metrics as they come, no process left behind.

``torch.distributed.run`` starts the ranks of one machine. The workers stay in this process's
group, so Prefect's cancellation and Ctrl-C reach them, and the kernel ends them when this process
dies (parent-death signal), SIGKILL included.
"""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fpo_core.errors import FPOError, Preempted
from fpo_core.processes import end_with_parent
from fpo_core.training.checkpoint import is_complete
from fpo_core.training.job import (
    ERROR_FILE,
    HELDOUT_FILE,
    LOG_FILES,
    METRICS_FILE,
    PREEMPTED_FILE,
    WARNINGS_FILE,
    TrainingJob,
)

log = logging.getLogger("fpo.stage")
JOB_FILE, LOG_FILE = "job.json", "workers.log"
POLL_SECONDS = 0.2
# For the workers to end their step and save; Prefect kills a cancelled run after 30 seconds.
GRACE_SECONDS = 28.0


_OUT_OF_MEMORY = re.compile(r"exitcode *: -9\b|Signal 9 ")


def run_workers(
    job: TrainingJob,
    ranks: int,
    on_step: Callable[[dict[str, Any]], None],
    on_checkpoint: Callable[[Path], None] = lambda _folder: None,
    on_heldout: Callable[[dict[str, Any]], None] = lambda _record: None,
) -> None:
    """Run a training job to its end in worker processes.

    When this is interrupted, the workers are told to stop: they finish their step, save and leave;
    who is not gone after 28 seconds is killed.

    Args:
        job: the run; ``job.output`` is emptied of an earlier attempt's metrics.
        ranks: worker processes.
        on_step: called with every step's metrics as rank 0 writes them, with those before
            ``job.resume`` first.
        on_checkpoint: called with the folder of every checkpoint that is complete.
        on_heldout: called with every record on held-out pairs, as ``on_step`` is; the two come in
            the order of their steps.

    Raises:
        FPOError: with the worker's own message, or the end of its log when it crashed.
        Preempted: the workers were told to stop.
    """
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise FPOError(
            f"resources.ranks={ranks}, but this machine has {torch.cuda.device_count()} GPUs"
        )
    job.output.mkdir(parents=True, exist_ok=True)
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    for name in (ERROR_FILE.format(rank="*"), *LOG_FILES, WARNINGS_FILE, PREEMPTED_FILE):
        for file in job.output.glob(name):
            file.unlink()
    job.save(job.output / JOB_FILE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc_per_node={ranks}", "-m", "fpo_core.training.worker",
        str(job.output / JOB_FILE),
    ]  # fmt: skip
    with (job.output / LOG_FILE).open("wb") as said:
        process = subprocess.Popen(  # noqa: S603 - our own command, no shell
            command, stdout=said, stderr=subprocess.STDOUT, env=_environment(job),
            preexec_fn=end_with_parent(),
        )  # fmt: skip
        seen: set[Path] = set()
        warnings = _Tail(job.output / WARNINGS_FILE)
        logs = {METRICS_FILE: on_step, HELDOUT_FILE: on_heldout}
        tails = {name: _Tail(job.output / name) for name in logs}
        try:
            running = True
            while running:
                running = process.poll() is None
                _tell_of_records(tails, logs)
                for line in warnings.new_lines():
                    log.warning("train: %s", line)
                _tell_of_checkpoints(job.checkpoints, seen, on_checkpoint)
                if running:
                    time.sleep(POLL_SECONDS)
        finally:
            _end(process)
            _tell_of_checkpoints(job.checkpoints, seen, on_checkpoint)
    preempted = job.output / PREEMPTED_FILE
    if preempted.is_file():
        step = json.loads(preempted.read_text())["step"]
        raise Preempted(
            f"training was told to stop, after step {step}; the same command goes on from its last "
            f"checkpoint"
        )
    if process.returncode != 0:
        raise _failure(job.output, process.returncode)


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


def _environment(job: TrainingJob) -> dict[str, str]:
    env = dict(os.environ)
    if not torch.cuda.is_available():
        env["DS_ACCELERATOR"] = "cpu"
    # The workers import this very checkout, from whatever folder the command runs in.
    root = str(Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    env["OMP_NUM_THREADS"] = str(job.threads or torch.get_num_threads())
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


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell the launcher to stop, which tells its workers; by force when it takes too long."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failure(output: Path, code: int) -> Exception:
    """Why the workers failed: what the first of them to fail said, or how the launcher ended."""
    failures = {
        file.stem.removeprefix("error-"): json.loads(file.read_text())
        for file in output.glob(ERROR_FILE.format(rank="*"))
    }
    if failures:
        rank, first = min(failures.items(), key=lambda item: item[1]["time"])
        if first["message"]:
            return FPOError(first["message"])
        if "OutOfMemoryError" in first["traceback"]:
            return _out_of_memory(output)
        return FPOError(f"training failed on {rank} first:\n{first['traceback'].rstrip()}")
    tail = (output / LOG_FILE).read_text(errors="replace").splitlines()[-30:]
    # The launcher reports a killed rank in its log and exits with 1 itself.
    if code == -signal.SIGKILL or any(_OUT_OF_MEMORY.search(line) for line in tail):
        return _out_of_memory(output)
    return FPOError(
        f"the training workers failed with code {code}; the end of their log:\n" + "\n".join(tail)
    )


def _out_of_memory(output: Path) -> FPOError:
    metrics = output / METRICS_FILE
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    peak = "before the first step was done"
    if lines:
        last = json.loads(lines[-1])
        peak = f"rank 0 had used {last['peak_memory_mb']:,.0f} MB by step {last['step']}"
    return FPOError(
        f"the training workers were killed, most likely for memory ({peak}); lower "
        f"resources.tokens_per_batch, set train.activation_checkpointing=true, or spread the "
        f"state over ranks with train.zero_stage"
    )
