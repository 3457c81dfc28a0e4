"""A training worker: one rank of a DeepSpeed engine. ``python -m fpo_core.training.worker JOB``.

The loop is short on purpose: examples in a deterministic order, micro-batches under a token
budget, one optimizer step a global batch. Losses are summed over the global batch and divided by
its size, whatever the ranks and micro-batches.
"""

import json
import logging
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from fpo_core.data.batches import batches_by_length, check_vocabulary, collate
from fpo_core.errors import FPOError
from fpo_core.logprobs import output_head
from fpo_core.memory import peak_memory_mb
from fpo_core.models.attention import attention_by_parts
from fpo_core.models.forward import PairForward
from fpo_core.models.load import prepare_cpu
from fpo_core.recipe.methods import METHODS
from fpo_core.sae.coder import AttachedSae, load_coder
from fpo_core.training.bad_batch import keep_bad_batch
from fpo_core.training.cached import cached_batch
from fpo_core.training.checkpoint import begin_logs
from fpo_core.training.engine import fp32_grad_norm, lr_factor, make_engine, start_distributed
from fpo_core.training.examples import AlignedShards, Example
from fpo_core.training.feature_shards import FeatureShards
from fpo_core.training.heldout import HeldoutMonitor
from fpo_core.training.job import (
    BAD_BATCH_FILE,
    ERROR_FILE,
    METRICS_FILE,
    NO_JOB,
    RANK_LOG,
    TrainingJob,
)
from fpo_core.training.live_reference import load_live_reference
from fpo_core.training.loss import BatchLoss, PairLoss, metric_sums
from fpo_core.training.orders import leave_with_the_stage
from fpo_core.training.saver import Saver
from fpo_core.training.start_gate import check_start
from fpo_core.training.stream import ExampleStream


class Trainer:
    """One rank's engine, data and loop.

    Args:
        job: the run.
    """

    def __init__(self, job: TrainingJob) -> None:
        self.job = job
        self.device = start_distributed()
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        needed = METHODS[job.settings.method].needs_reference_model
        reference = load_live_reference(job, self.device) if needed else None
        self.loss = PairLoss(job.settings, self._saes(), reference)
        self.shards = self._shards("train")
        model = self._model()
        vocabulary = len(output_head(model).weight)
        self.stream = ExampleStream(
            self.shards,
            job.settings,
            lambda examples: check_vocabulary((e.ids for e in examples), vocabulary),
            (self.rank, self.world),
        )
        self.steps = self.stream.steps
        self.engine = self._engine(model)
        self.grad_norm: float | None = None
        self.data_seconds = 0.0  # of a step, for its examples and batches
        self.saver = Saver(job, self.engine, self.device)
        self.done = self.saver.resume()
        self.heldout = self._heldout_monitor()

    def _saes(self) -> list[AttachedSae]:
        decoder = self.job.monitor is not None  # for the FVU on held-out pairs
        return [
            AttachedSae(load_coder(sae.folder, decoder=decoder).to(self.device), sae.hookpoint)
            for sae in self.job.saes
        ]

    def _shards(self, split: str) -> AlignedShards:
        job, settings = self.job, self.job.settings
        caches = [
            FeatureShards(
                sae.pooled, sae.tokens, attached.coder.d_sae,
                settings.pinned if number == 0 else (), sae.label,
            )
            for number, (sae, attached) in enumerate(
                zip(job.saes, self.loss.saes, strict=True)
            )
        ]  # fmt: skip
        return AlignedShards(job.pairs, job.reference, caches, settings.k, split)

    def _heldout_monitor(self) -> HeldoutMonitor | None:
        """What measures the policy on held-out pairs, where the job asks for it and has some."""
        if self.job.monitor is None:
            return None
        examples = self._shards("heldout").first(self.job.monitor.heldout_pairs)
        if not examples:
            return None
        return HeldoutMonitor(self.job, self.loss, examples, self._micro_batches, self.device)

    def _model(self) -> Any:
        """The policy in float32, its masters: at lr 5e-7 a bfloat16 parameter would not move."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.job.model_folder,
            dtype=torch.float32,
            attn_implementation=attention_by_parts(self.job.attention, self.device),
            local_files_only=True,
            use_safetensors=True,  # only these files are hashed
            trust_remote_code=False,
        )

    def _engine(self, model: Any) -> Any:
        half = self.job.reference_dtype == "bfloat16" and self.device != "cpu"
        return make_engine(
            model, self.loss.hookpoints, self.job.settings, self.steps,
            half=half, offload=self.job.offload,
        )  # fmt: skip

    def run(self) -> None:
        """Train to the end and save the policy."""
        metrics = self.job.output / METRICS_FILE
        if self.rank == 0:
            begin_logs(self.job.output, self.job.resume)
        if self.heldout:
            self.heldout.after_step(self.engine, self.done, last=False)
        with metrics.open("a") as log, self.stream:
            started = time.monotonic()
            for step, batch in self.stream.batches(self.done):
                self.data_seconds = time.monotonic() - started  # waited for the examples
                sums = self._step(step, batch)
                if self.rank == 0:
                    record = self._record(step, sums, len(batch), time.monotonic() - started)
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                if self.heldout:
                    self.heldout.after_step(
                        self.engine, step, last=step == self.steps, stop=self.saver.told_to_stop
                    )
                if step < self.steps and self.saver.after_step(step):
                    return
                started = time.monotonic()
        self.saver.save_policy(self.shards.first(1)[0].ids)

    def _step(self, step: int, batch: list[Example]) -> dict[str, float]:
        # By length, so that every rank has as much to do.
        mine = sorted(batch, key=lambda example: -example.ids.length)[self.rank :: self.world]
        groups = self._micro_batches(mine)
        totals: dict[str, float] = {}
        for number, rows in enumerate(groups):
            examples = [mine[row] for row in rows] or batch[:1]
            loss, tokens = self._losses(step, examples)
            self.engine.set_gradient_accumulation_boundary(number == len(groups) - 1)
            # DeepSpeed averages over ranks; the objective is the mean over the global batch.
            weight = self.world / len(batch) if rows else 0.0
            self.engine.backward(loss.losses.sum() * weight)
            if number == len(groups) - 1:
                self.grad_norm = fp32_grad_norm(self.engine)
            self.engine.step()
            compared = bool(self.job.reference)
            sums = metric_sums(loss, self.job.settings, compared=compared)
            sums["tokens"] = float(tokens)
            counted = 1.0 if rows else 0.0
            totals = {name: totals.get(name, 0.0) + counted * sums[name] for name in sums}
        summed = torch.tensor(list(totals.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return dict(zip(totals, summed.tolist(), strict=True))

    def _micro_batches(self, mine: list[Example]) -> list[list[int]]:
        """Rows of each micro-batch; as many on every rank, for ZeRO reduces at each backward.

        A rank with fewer gets empty ones: they run on any pair and count nothing.
        """
        lengths = [example.ids.length for example in mine]
        groups = list(batches_by_length(lengths, self.job.tokens_per_batch))
        most = torch.tensor(len(groups), device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return groups + [[] for _ in range(int(most) - len(groups))]

    def _losses(self, step: int, examples: list[Example]) -> tuple[BatchLoss, int]:
        """The loss of a micro-batch, and its tokens."""
        started = time.monotonic()
        batch = collate([example.ids for example in examples], device=self.device)
        cached = cached_batch(examples, self.device, self.job.settings.pinned)
        self.data_seconds += time.monotonic() - started
        out: PairForward = self.engine(batch, self.loss.live(batch))
        loss = self.loss(batch, out, cached)
        if step == 1 and self.job.reference:
            job = self.job
            check_start(loss, cached, batch, job.saes, job.settings, job.reference_dtype)
        if not torch.isfinite(loss.losses).all():
            file = self.job.output / BAD_BATCH_FILE.format(step=step, rank=self.rank)
            raise keep_bad_batch(file, step, examples, loss)
        return loss, batch.num_tokens

    def _record(
        self, step: int, sums: dict[str, float], pairs: int, seconds: float
    ) -> dict[str, Any]:
        means = {name: value / pairs for name, value in sums.items() if name != "tokens"}
        return {
            "step": step,
            "steps": self.steps,
            "pairs": pairs,
            **means,
            "grad_norm": self._grad_norm(),
            # The step's own: the engine's schedule is at the next one by now.
            "lr": self.job.settings.lr * lr_factor(self.job.settings, step - 1, self.steps),
            "seconds": seconds,
            "data_seconds": self.data_seconds,
            "tokens_per_second": sums["tokens"] / seconds,
            "peak_memory_mb": peak_memory_mb(),
        }

    def _grad_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return self.grad_norm if norm is None else float(norm)


def _job(path: Path) -> TrainingJob:
    try:
        return TrainingJob.load(path)
    except OSError as error:
        sys.exit(
            f"{NO_JOB} {socket.gethostname()}: {path} cannot be read there ({error.strerror}). All "
            f"hosts of resources.hostfile need the store's work in progress, the checkout and the "
            f"Python environment under the same paths"
        )


def main() -> None:
    """Run one rank; why it failed goes to its error file, for the stage to show."""
    job, rank = _job(Path(sys.argv[1])), int(os.environ["RANK"])
    with (job.output / RANK_LOG.format(rank=rank)).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("fpo").setLevel(logging.INFO)
    leave_with_the_stage(job.output, job.patience)
    prepare_cpu(job.threads)
    try:
        trainer = Trainer(job)
        trainer.run()
    except Exception as error:
        told = str(error) if isinstance(error, FPOError) else None
        failure = {"time": time.time(), "message": told, "traceback": traceback.format_exc()}
        (job.output / ERROR_FILE.format(rank=rank)).write_text(json.dumps(failure))
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
