"""What a training worker is told: one JSON file, written by the stage, read by every rank."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fpo_core.recipe.schema import TrainSettings

# What the workers write below the job's output folder.
ERROR_FILE, METRICS_FILE, MODEL_FOLDER = "error.json", "metrics.jsonl", "model"


class TrainingJob(BaseModel):
    """Local files and settings of one training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_folder: Path
    attention: str
    sae_folder: Path
    layer: int
    settings: TrainSettings
    pairs: tuple[Path, ...]  # aligned shards: the i-th of each holds the same pairs
    reference: tuple[Path, ...]
    pooled: tuple[Path, ...]
    reference_dtype: str  # dtype the caches were computed in; bounds the drift at step 0
    tokens_per_batch: int
    threads: int | None
    output: Path  # receives model/ and metrics.jsonl

    def save(self, path: Path) -> None:
        """Write the job for the workers."""
        path.write_text(self.model_dump_json(indent=2))

    @classmethod
    def load(cls, path: Path) -> "TrainingJob":
        """Read a job file."""
        return cls.model_validate(json.loads(path.read_text()))
