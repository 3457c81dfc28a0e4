"""Caches of eight pairs made by the real offline pass, and training on them in real workers."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from fpo_core.data.batches import PairIds
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.budget import TokenBudget
from fpo_core.models.load import load_model
from fpo_core.offline import WantedFeatures, score_shard
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.recipe.training import TrainSettings
from fpo_core.sae.coder import load_coder
from fpo_core.training.job import JobSae, TrainingJob
from fpo_core.training.launch import run_workers
from storage.schemas import FEATURES_POOLED, FEATURES_TOKENS, PAIRS
from tasks.arrow import to_table
from tests.tiny import SAE_LAYER, save_model, save_sae

PINNED = (2, 5, 40)
FIRST, LAST = Hookpoint(SAE_LAYER), Hookpoint(2, "final_norm")


def make_caches(root: Path, heldout: int = 0) -> Path:
    """Model, SAE and aligned shards in a folder: 8 pairs to train on, and held-out ones."""
    save_model(root / "model")
    save_sae(root / "sae")
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(2, 400, (count,), generator=generator).tolist()

    pairs = [
        PairIds(f"p{n}", ids(3 + n % 3), [*ids(2 + n % 4), 1], [*ids(1 + n % 5), 1])
        for n in range(8 + heldout)
    ]
    write_caches(root, pairs, load_model(root / "model", dtype="float32", attention="sdpa"))
    return root


def write_caches(root, pairs, model):
    coder = load_coder(root / "sae")
    settings = FeatureSettings(cache_k=96, tokens_k=96)
    saes = [WantedFeatures(coder, Hookpoint(SAE_LAYER), settings, PINNED),
            WantedFeatures(coder, LAST, settings)]  # fmt: skip
    scores = score_shard(model, pairs, saes, want_reference=True, budget=TokenBudget(64))
    first, last = scores.features
    rows = [
        {"pair_id": p.pair_id, "prompt_ids": p.prompt, "chosen_ids": p.chosen,
         "rejected_ids": p.rejected, "chosen_unscored": p.unscored[0],
         "rejected_unscored": p.unscored[1], "split": "train" if number < 8 else "heldout",
         "source": f"line {number}"}
        for number, p in enumerate(pairs)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), root / "pairs.parquet")
    pq.write_table(pa.table(scores.reference), root / "reference.parquet")
    pq.write_table(to_table(last.pooled, FEATURES_POOLED), root / "last.parquet")
    pq.write_table(to_table(first.pooled, FEATURES_POOLED), root / "pooled.parquet")
    pq.write_table(to_table(first.tokens, FEATURES_TOKENS), root / "tokens.parquet")


def sae(root: Path, hookpoint=FIRST, pooled="pooled", tokens=()) -> JobSae:
    return JobSae(
        folder=root / "sae", hookpoint=hookpoint, pooled=(root / f"{pooled}.parquet",),
        tokens=tuple(root / f"{name}.parquet" for name in tokens),
    )  # fmt: skip


def job(root: Path, output: Path, saes=(), **settings) -> TrainingJob:
    defaults = {"lr": 1e-3, "warmup_steps": 0, "batch_size": 4, "k": 8, "epochs": 2,
                "bucket_batches": 1}  # fmt: skip
    return TrainingJob(
        model_folder=root / "model", attention="sdpa",
        saes=saes or (sae(root),),
        settings=TrainSettings(**{**defaults, **settings}),
        pairs=(root / "pairs.parquet",), reference=(root / "reference.parquet",),
        reference_dtype="float32",
        tokens_per_batch=64, threads=1, output=output, version="0" * 16,
        made_from={"lr": 1.0, "k": 8},
        checkpoints=output / "checkpoints", checkpoint_minutes=100.0,
    )  # fmt: skip


def train(root, output, ranks=1, saes=(), **settings):
    records = []
    run_workers(job(root, output, saes, **settings), ranks, records.append)
    return records, load_file(output / "model" / "model.safetensors")


def worker_processes(folder: Path) -> list[tuple[int, str]]:
    """Process ids and command lines of launcher and ranks that work below a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(folder) in line and "fpo_core.training.worker" in line:
                found.append((int(entry.name), line))
    return found


def ranks_of(folder: Path) -> list[int]:
    """Process ids of the ranks, by rank."""
    found = {}
    for pid, line in worker_processes(folder):
        if "launcher" not in line and "torch.distributed.run" not in line:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next(v for v in environment if v.startswith(b"RANK="))
            found[int(rank[5:])] = pid
    return [found[rank] for rank in sorted(found)]
