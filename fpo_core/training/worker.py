"""A training worker: one rank of a DeepSpeed engine. ``python -m fpo_core.training.worker JOB``.

The loop is short on purpose: examples in a deterministic order, micro-batches under a token
budget, one optimizer step a global batch. Losses are summed over the global batch and divided by
its size, whatever the ranks and micro-batches.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpo_core import objectives
from fpo_core.data.batches import PairBatch, batches_by_length, collate
from fpo_core.errors import FPOError
from fpo_core.features.discrepancy import Discrepancy, feature_discrepancy
from fpo_core.logprobs import kl_divergences, output_head, sum_by_response
from fpo_core.models.forward import PairForward, forward_pairs
from fpo_core.models.load import load_model, prepare_cpu
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.options import objective_options
from fpo_core.sae.coder import SparseCoder, load_coder
from fpo_core.training.examples import (
    Example,
    epoch_batches,
    num_steps,
    read_examples,
    reference_features,
)
from fpo_core.training.job import ERROR_FILE, METRICS_FILE, MODEL_FOLDER, TrainingJob
from fpo_core.training.start_gate import check_start


class Policy(nn.Module):
    """The language model with ``forward`` over pairs, which is what the engine wraps."""

    def __init__(self, model: Any, layer: int) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, batch: PairBatch) -> PairForward:
        """Log-probs and activations of a batch of pairs."""
        return forward_pairs(self.model, batch, self.layer)


class StepMetrics(NamedTuple):
    """Sums over pairs of what a step logs; divided by the batch size when written."""

    loss: float
    accuracy: float
    margin: float
    chosen_reward: float
    rejected_reward: float
    difference: float  # the three parts of u
    target_margin: float
    constraint: float
    discrepancy_chosen: float
    discrepancy_rejected: float
    kl_chosen: float  # 0 where the objective needs no live reference
    kl_rejected: float
    missing: float
    tokens: float


class Trainer:
    """One rank's engine, data and loop.

    Args:
        job: the run.
    """

    def __init__(self, job: TrainingJob) -> None:
        import deepspeed

        self.job = job
        self.cuda = torch.cuda.is_available()
        # Else DeepSpeed compiles a shared-memory all-reduce when it first starts on a CPU, which
        # takes a C++ compiler and most of a minute, and serves several ranks of one machine only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if self.cuda else "gloo", verbose=False)
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if self.cuda else "cpu"
        self.examples = read_examples(job.pairs, job.reference, job.pooled, "train")
        self.steps = num_steps(len(self.examples), job.settings.batch_size, job.settings.epochs)
        self.coder: SparseCoder = load_coder(job.sae_folder).to(self.device)
        self.method, self.options = METHODS[job.settings.method], objective_options(job.settings)
        self.reference = self._live_reference() if self.method.needs_reference_model else None
        self.engine = self._engine()
        self.grad_norm: float | None = None

    def _live_reference(self) -> Any:
        """The frozen reference model, for objectives with a KL; the others never load it."""
        return load_model(
            self.job.model_folder, dtype=self.job.reference_dtype, attention=self.job.attention,
            device=self.device,
        )  # fmt: skip

    def _engine(self) -> Any:
        import deepspeed
        from transformers import AutoModelForCausalLM

        settings = self.job.settings
        # float32 masters: at lr 5e-7 a bfloat16 parameter would not move.
        model = AutoModelForCausalLM.from_pretrained(
            self.job.model_folder,
            dtype=torch.float32,
            attn_implementation=self.job.attention,
            local_files_only=True,
        )
        model.train()
        model.apply(_without_dropout)
        if settings.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        engine, *_ = deepspeed.initialize(
            model=Policy(model, self.job.layer),
            optimizer=self._optimizer(model),
            lr_scheduler=self._warmup,
            config={
                "train_micro_batch_size_per_gpu": 1,  # ours vary; the loss is scaled here, below
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": settings.zero_stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "gradient_clipping": settings.max_grad_norm,
                "bf16": {"enabled": self.cuda and self.job.reference_dtype == "bfloat16"},
                "steps_per_print": sys.maxsize,
            },
        )
        return engine

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        kinds: dict[str, Any] = {
            "adam": torch.optim.Adam,
            "adamw": torch.optim.AdamW,
            "rmsprop": torch.optim.RMSprop,
        }
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = {} if self.job.settings.optimizer == "rmsprop" else {"fused": True}
        return kinds[self.job.settings.optimizer](parameters, lr=self.job.settings.lr, **fused)

    def _warmup(self, optimizer: Any) -> Any:
        warmup = min(self.job.settings.warmup_steps, self.steps)
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1))
        )

    def run(self) -> None:
        """Train to the end and save the policy."""
        settings = self.job.settings
        order = epoch_batches(
            len(self.examples), settings.batch_size, settings.epochs, settings.seed
        )
        with (self.job.output / METRICS_FILE).open("w") as log:
            for step, rows in enumerate(order, start=1):
                started = time.monotonic()
                sums = self._step([self.examples[row] for row in rows], first=step == 1)
                if self.rank == 0:
                    record = self._record(step, sums, len(rows), time.monotonic() - started)
                    log.write(json.dumps(record) + "\n")
                    log.flush()
        self._save()

    def _step(self, batch: list[Example], *, first: bool) -> StepMetrics:
        mine = batch[self.rank :: self.world]
        groups = self._micro_batches(mine)
        totals = torch.zeros(len(StepMetrics._fields), dtype=torch.float64)
        for number, rows in enumerate(groups):
            examples = [mine[row] for row in rows] or batch[:1]
            losses, sums = self._losses(examples, check=first)
            if not torch.isfinite(losses).all():
                raise FPOError(
                    f"the loss is {losses.tolist()} for the pairs "
                    f"{[example.ids.pair_id for example in examples]}; lower train.lr or "
                    f"train.max_grad_norm"
                )
            self.engine.set_gradient_accumulation_boundary(number == len(groups) - 1)
            # DeepSpeed averages over ranks; the objective is the mean over the global batch.
            weight = self.world / len(batch) if rows else 0.0
            self.engine.backward(losses.sum() * weight)
            if number == len(groups) - 1:
                self.grad_norm = self._fp32_grad_norm()
            self.engine.step()
            if rows:
                totals += torch.tensor(sums, dtype=torch.float64)
        torch.distributed.all_reduce(totals := totals.to(self.device))
        return StepMetrics(*totals.tolist())

    def _fp32_grad_norm(self) -> float | None:
        """The unclipped gradient's norm on the plain float32 path, where DeepSpeed reports none."""
        if self.engine.bfloat16_enabled() or self.job.settings.zero_stage:
            return None
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads))

    def _micro_batches(self, mine: list[Example]) -> list[list[int]]:
        """Rows of each micro-batch; as many on every rank, for ZeRO reduces at each backward.

        A rank with fewer gets empty ones: they run on any pair and count nothing.
        """
        lengths = [example.ids.length for example in mine]
        groups = list(batches_by_length(lengths, self.job.tokens_per_batch))
        most = torch.tensor(len(groups), device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return groups + [[] for _ in range(int(most) - len(groups))]

    def _losses(self, examples: list[Example], *, check: bool) -> tuple[Tensor, StepMetrics]:
        batch = collate([example.ids for example in examples], device=self.device)
        out: PairForward = self.engine(batch)
        reference, cutoff = reference_features(examples, self.device)
        with torch.set_grad_enabled(self.method.constraint == "features"):
            features = feature_discrepancy(
                self.coder, out.activations, batch.response, batch.lengths,
                reference, cutoff, self.job.settings.k, self.job.settings.index_set,
            )  # fmt: skip
        kl = self._kl(batch, out)
        reference_logps = torch.tensor(
            [logp for example in examples for logp in example.logps],
            dtype=torch.float64, device=self.device,
        )  # fmt: skip
        if check:
            check_start(
                out.logps.detach(), reference_logps, batch.lengths, features.values.detach(),
                reference.values[:, : self.job.settings.k], self.job.reference_dtype,
                batch.pair_ids,
            )  # fmt: skip
        divergence = kl if self.method.constraint == "kl" else features.values
        sides = [
            objectives.SideScores(
                out.logps[side::2], reference_logps[side::2], batch.lengths[side::2],
                divergence[side::2],
            )
            for side in (0, 1)
        ]  # fmt: skip
        result = objectives.objective(self.method, self.options, *sides)
        return result.losses, _sums(result, features, kl.detach(), batch)

    def _kl(self, batch: PairBatch, out: PairForward) -> Tensor:
        """K [R]: KL(reference || policy) summed over scored positions; 0 without a reference."""
        if self.reference is None:
            return torch.zeros(len(batch.lengths), dtype=torch.float64, device=self.device)
        with torch.no_grad():
            ref = forward_pairs(self.reference, batch, self.job.layer)
        divergences = kl_divergences(
            ref.hidden, output_head(self.reference),
            out.hidden, output_head(self.engine.module.model),
        )  # fmt: skip
        return sum_by_response(divergences, batch.response, len(batch.lengths))

    def _record(self, step: int, sums: StepMetrics, pairs: int, seconds: float) -> dict[str, Any]:
        means = {name: value / pairs for name, value in sums._asdict().items()}
        del means["tokens"]
        return {
            "step": step,
            "steps": self.steps,
            "pairs": pairs,
            **means,
            "grad_norm": self._grad_norm(),
            "lr": float(self.engine.get_lr()[0]),
            "seconds": seconds,
            "tokens_per_second": sums.tokens / seconds,
        }

    def _grad_norm(self) -> float | None:
        norm = self.engine.get_global_grad_norm()
        return self.grad_norm if norm is None else float(norm)

    def _save(self) -> None:
        if self.rank == 0:
            model = self.engine.module.model
            model.config.use_cache = True
            model.save_pretrained(self.job.output / MODEL_FOLDER)
        torch.distributed.barrier()


def _without_dropout(module: Any) -> None:
    """The invariant at step 0 needs policy = reference, in training mode too."""
    if hasattr(module, "attention_dropout"):
        module.attention_dropout = 0.0
    elif isinstance(module, nn.Dropout):
        module.p = 0.0


def _sums(
    result: objectives.Objective, features: Discrepancy, kl: Tensor, batch: PairBatch
) -> StepMetrics:
    margins = result.chosen_rewards - result.rejected_rewards
    values = features.values.detach()
    return StepMetrics(
        loss=float(result.losses.detach().sum()),
        accuracy=float((margins > 0).sum()),
        margin=float(margins.sum()),
        chosen_reward=float(result.chosen_rewards.sum()),
        rejected_reward=float(result.rejected_rewards.sum()),
        difference=float(result.difference.sum()),
        target_margin=float(result.margin.sum()),
        constraint=float(result.constraint.sum()),
        discrepancy_chosen=float(values[0::2].sum()),
        discrepancy_rejected=float(values[1::2].sum()),
        kl_chosen=float(kl[0::2].sum()),
        kl_rejected=float(kl[1::2].sum()),
        missing=float(features.missing.sum()),
        tokens=float(batch.num_tokens),
    )


def main() -> int:
    """Run one rank; a user's error goes to ``error.json`` for the stage to show."""
    job = TrainingJob.load(Path(sys.argv[1]))
    prepare_cpu(job.threads)
    try:
        trainer = Trainer(job)
        trainer.run()
    except FPOError as error:
        (job.output / ERROR_FILE).write_text(json.dumps({"message": str(error)}))
        return 1
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
