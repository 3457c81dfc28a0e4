"""Where a training run's figures go as they come: TensorBoard's event files, and Weights & Biases.

Both are told the records of training: ``train/NAME`` of every step, ``heldout/NAME`` of every
measurement on held-out pairs. They run in the process of the stage, never in a training worker.
W&B gets the figures and the training's settings, where a recipe asks for it, and nothing else: no
code, no output, no facts about the machine. Its key comes from the environment, as it reads it.
"""

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fpo_core.errors import FPOError

log = logging.getLogger("fpo.stage")

# The name that an event file is stored under: TensorBoard reads *tfevents*, and the library's own
# name holds the machine's.
EVENT_FILE = "events.out.tfevents.0"
FLUSH_SECONDS = 5
_NOT_DRAWN = ("step", "steps")


class Tracker(Protocol):
    """Who is told the figures of a run."""

    def log(self, section: str, record: Mapping[str, Any]) -> None:
        """Take a record of a step: ``section`` is ``train`` or ``heldout``."""
        ...


class TensorBoard:
    """Writes an event file.

    Args:
        folder: receives it; ``tensorboard --logdir`` follows it there.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)

    def log(self, section: str, record: Mapping[str, Any]) -> None:
        """Write a record's figures at its step."""
        for name, value in figures(section, record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbRun:
    """A run on Weights & Biases, the same one whenever training goes on.

    Args:
        project: the W&B project.
        name: the run's.
        version: the policy's, which is the run's id.
        config: shown with the run.

    Raises:
        FPOError: W&B does not take the run.
    """

    def __init__(self, project: str, name: str, version: str, config: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=project, name=name, id=version, resume="allow", config=dict(config),
                settings=wandb.Settings(
                    silent=True, console="off", save_code=False, disable_code=True,
                    disable_git=True, disable_job_creation=True, x_disable_meta=True,
                    x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
                    host="",
                ),
            )  # fmt: skip
        except wandb.Error as error:
            raise FPOError(
                f"monitor.wandb={project}: Weights & Biases does not take the run ({error}). Set "
                f"WANDB_API_KEY, or WANDB_MODE=offline to send it later, or leave monitor.wandb out"
            ) from error
        if not (self._run.offline or self._run.disabled):
            log.info("train: %s", self._run.url)

    def log(self, section: str, record: Mapping[str, Any]) -> None:
        """Send a record's figures, but for steps that W&B has from before a resume."""
        if record["step"] >= self._run.step:
            self._run.log(figures(section, record), step=record["step"])

    def close(self, *, failed: bool) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(failed))


@contextmanager
def wandb_run(
    project: str | None, name: str, version: str, config: Mapping[str, Any]
) -> Iterator[WandbRun | None]:
    """A run on W&B while the context is open; None where no project is given."""
    if project is None:
        yield None
        return
    run = WandbRun(project, name, version, config)
    failed = True
    try:
        yield run
        failed = False
    finally:
        run.close(failed=failed)


def figures(section: str, record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers, by the name that they are drawn under."""
    return {
        f"{section}/{name}": float(value)
        for name, value in record.items()
        if name not in _NOT_DRAWN and isinstance(value, (int, float))
    }


def check_wandb(project: str | None) -> None:
    """Refuse a W&B project where the package is not installed.

    Raises:
        FPOError: with the command that installs it.
    """
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise FPOError(
            f"monitor.wandb={project} needs the package wandb, which is not installed: run "
            f"`pip install 'fpo-pipeline[wandb]'` in this environment, or leave monitor.wandb out"
        )
