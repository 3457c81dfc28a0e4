"""Why the workers failed, from what they left behind."""

import json
import re
import signal
from pathlib import Path

from fpo_core.errors import FPOError
from fpo_core.training.job import ERROR_FILE, LOG_FILE, METRICS_FILE, NO_JOB

# As torch's launcher, a shell and DeepSpeed's launcher say that a rank got SIGKILL.
_OUT_OF_MEMORY = re.compile(r"exitcode *: -9\b|Signal 9 |return code = -9\b")
_NO_SSH = re.compile(r"host=(\S+) was not reachable via ssh")


def failure(output: Path, code: int) -> FPOError:
    """What the first rank to fail said, or how the launcher ended.

    Args:
        output: the job's output folder.
        code: the launcher's exit code.
    """
    failures = {
        file.stem.removeprefix("error-"): json.loads(file.read_text())
        for file in output.glob(ERROR_FILE.format(rank="*"))
    }
    tail = (output / LOG_FILE).read_text(errors="replace").splitlines()[-30:]
    # The launcher reports a killed rank in its log and exits with 1 itself.
    killed = code == -signal.SIGKILL or any(_OUT_OF_MEMORY.search(line) for line in tail)
    if failures:
        rank, first = min(failures.items(), key=lambda item: item[1]["time"])
        if first["message"]:
            return FPOError(first["message"])
        if killed or "OutOfMemoryError" in first["traceback"]:
            return _out_of_memory(output)
        return FPOError(f"training failed on {rank} first:\n{first['traceback'].rstrip()}")
    if killed:
        return _out_of_memory(output)
    for line in tail:
        if (start := line.find(NO_JOB)) >= 0:
            return FPOError(line[start:])
        if unreachable := _NO_SSH.search(line):
            return FPOError(
                f"resources.hostfile: {unreachable[1]} cannot be reached by ssh without a password"
            )
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
        f"state over ranks with train.zero_stage. The same command goes on from the last "
        f"checkpoint, if there is one, unless a setting of train changed"
    )
