"""What a rank saves, and when: checkpoints, the state of a run that is told to stop, the policy."""

import json
import signal
import time
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from fpo_core.data.batches import PairIds, collate
from fpo_core.errors import FPOError
from fpo_core.training.checkpoint import (
    Checkpoint,
    check_same_run,
    folder_name,
    full_masters,
    load_checkpoint,
    read_meta,
    save_checkpoint,
)
from fpo_core.training.engine import set_schedule
from fpo_core.training.job import (
    LAST_FILE,
    MODEL_FOLDER,
    PREEMPTED_FILE,
    WARNINGS_FILE,
    TrainingJob,
)
from fpo_core.training.orders import told_to_stop

MOST_UNSAVED = 2  # checkpoints in a row


class Saver:
    """One rank's part in saving; the ranks call it alike. It takes SIGTERM and SIGINT.

    Args:
        job: the run.
        engine: the DeepSpeed engine.
        device: torch device of this rank.
    """

    def __init__(self, job: TrainingJob, engine: Any, device: str) -> None:
        self.job, self.engine, self.device = job, engine, device
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._saved_at, self._unsaved = time.monotonic(), 0
        self._asked_to_stop = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, _number: int, _frame: Any) -> None:
        """Preemption, cancellation or Ctrl-C: save at the end of this step, and leave."""
        self._asked_to_stop = True

    def resume(self) -> int:
        """Steps that an earlier attempt did; its state is the engine's then.

        Raises:
            FPOError: the checkpoint is of another run, or damaged.
        """
        folder = self.job.resume
        if folder is None:
            return 0
        check_same_run(read_meta(folder), self.job)
        step = load_checkpoint(self.engine, folder)
        set_schedule(self.engine, step)
        return step

    def told_to_stop(self) -> bool:
        """Whether this rank knows of a wish to stop; the others learn it from an all-reduce."""
        return self._asked_to_stop or (self.rank == 0 and told_to_stop(self.job.output))

    def after_step(self, step: int) -> bool:
        """Save a checkpoint where one is due, on all ranks alike; True when told to stop."""
        minutes = (time.monotonic() - self._saved_at) / 60
        wishes = [minutes >= self.job.checkpoint_minutes, self.told_to_stop()]
        agreed = torch.tensor([float(wish) for wish in wishes], device=self.device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        due, stop = (bool(wish) for wish in agreed.tolist())
        if due or stop:
            self._save_checkpoint(step)
            self._saved_at = time.monotonic()
        if stop and self.rank == 0:
            (self.job.output / PREEMPTED_FILE).write_text(json.dumps({"step": step}))
        return stop

    def _save_checkpoint(self, step: int) -> None:
        """Write this rank's part; a disk that cannot take it is said, and training goes on.

        Raises:
            FPOError: it was so twice in a row.
        """
        folder = self.job.checkpoints / folder_name(step)
        meta = Checkpoint(step, self.world, self.job.version, self.job.made_from)
        try:
            save_checkpoint(self.engine, folder, meta, self.rank, self.job.output)
        except (OSError, SafetensorError) as error:
            self._unsaved += 1
            told = f"rank {self.rank} could not write checkpoint {folder.name}: {error}"
            if self._unsaved >= MOST_UNSAVED:
                raise FPOError(
                    f"{told}, after the one before. Make room where the store keeps "
                    f"its work in progress, and run the same command again: it goes on from the "
                    f"last checkpoint"
                ) from error
            with (self.job.output / WARNINGS_FILE).open("a") as warnings:
                warnings.write(told + "\n")
        else:
            self._unsaved = 0

    def save_policy(self, pair: PairIds) -> None:
        """Write the policy, of its float32 masters, and what it says of one pair."""
        half = self.engine.bfloat16_enabled()
        state = full_masters(self.engine, torch.bfloat16 if half else torch.float32)
        batch = collate([pair], device=self.device)
        with torch.no_grad():
            logps = self.engine.module(batch).logps.tolist()
        if self.rank == 0:
            model = self.engine.module.model
            model.config.use_cache = True
            model.config.dtype = self.job.reference_dtype if half else "float32"
            model.save_pretrained(self.job.output / MODEL_FOLDER, state_dict=state)
            ids = [np.asarray(part).tolist() for part in (pair.prompt, pair.chosen, pair.rejected)]
            unscored = [np.asarray(ranges).tolist() for ranges in pair.unscored]
            last = {"pair": [pair.pair_id, *ids, unscored], "logps": logps}
            (self.job.output / LAST_FILE).write_text(json.dumps(last))
        torch.distributed.barrier()
