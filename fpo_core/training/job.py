"""What a training worker is told: one JSON file, written by the stage, read by every rank."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fpo_core.hookpoint import Hookpoint
from fpo_core.recipe.schema import MonitorSettings, Offload
from fpo_core.recipe.training import TrainSettings

# What the workers write below the job's output folder.
METRICS_FILE, MODEL_FOLDER = "metrics.jsonl", "model"
HELDOUT_FILE = "heldout.jsonl"  # a line a measurement on held-out pairs
LOG_FILES = (METRICS_FILE, HELDOUT_FILE)  # what a resumed run goes on writing
LOG_FILE = "workers.log"  # all that the launcher said
RANK_LOG = "train-rank{rank}.log"  # all that a rank's process said
ERROR_FILE = "error-rank{rank}.json"  # why a rank failed, and when
LAST_FILE = "last.json"  # log-probs of one pair by the trained policy, to check what was saved
WARNINGS_FILE = "warnings.log"  # a line each, which the stage tells
PREEMPTED_FILE = "preempted.json"  # the run was told to stop, and saved itself
BAD_BATCH_FILE = "bad-batch-step{step}-rank{rank}.parquet"  # the batch of a loss that is not finite
NO_JOB = "cannot start on the host"  # begins what a rank says that cannot read its job


class JobSae(BaseModel):
    """An SAE and its cache of the reference's features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    hookpoint: Hookpoint
    pooled: tuple[Path, ...]  # shards aligned with the pairs'
    tokens: tuple[Path, ...] = ()  # the same, for the unpooled discrepancy

    @property
    def label(self) -> str:
        """Its cache, as messages name it."""
        return f"features ({self.hookpoint})"


class TrainingJob(BaseModel):
    """Local files and settings of one training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_folder: Path
    attention: str
    saes: tuple[JobSae, ...]  # the first one has the groups; none in a supervised warm start
    settings: TrainSettings
    pairs: tuple[Path, ...]  # aligned shards: the i-th of each holds the same pairs
    reference: tuple[Path, ...]  # none where the pairs are answers to learn, as in `sft`
    reference_dtype: str  # dtype the caches were computed in; bounds the drift at step 0
    tokens_per_batch: int
    threads: int | None
    offload: Offload = "none"
    output: Path  # receives model/, metrics.jsonl, heldout.jsonl and the ranks' logs
    version: str  # of the policy to be made, which a checkpoint has to be of
    made_from: dict[str, Any]  # settings and inputs that the version follows from
    checkpoints: Path  # receives a folder a checkpoint
    checkpoint_minutes: float
    resume: Path | None = None  # the checkpoint to go on from
    monitor: MonitorSettings | None = None  # None: nothing is measured on held-out pairs
    patience: float | None = None  # seconds that ranks of several hosts wait for a sign of life

    def save(self, path: Path) -> None:
        """Write the job for the workers."""
        path.write_text(self.model_dump_json(indent=2))

    @classmethod
    def load(cls, path: Path) -> "TrainingJob":
        """Read a job file."""
        return cls.model_validate(json.loads(path.read_text()))
