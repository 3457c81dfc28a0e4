"""The DeepSpeed engine around a policy: precision, ZeRO stage, optimizer, warm-up."""

import math
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fpo_core.data.batches import PairBatch
from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.forward import PairForward, ReferenceSide, forward_pairs
from fpo_core.recipe.schema import Offload
from fpo_core.recipe.training import TrainSettings


class Policy(nn.Module):
    """The language model with ``forward`` over pairs, which is what the engine wraps."""

    def __init__(self, model: Any, hookpoints: Sequence[Hookpoint]) -> None:
        super().__init__()
        self.model, self.hookpoints = model, hookpoints

    def forward(self, batch: PairBatch, reference: ReferenceSide | None = None) -> PairForward:
        """Log-probs, activations and KL of a batch of pairs."""
        return forward_pairs(self.model, batch, self.hookpoints, reference)


def start_distributed() -> str:
    """Join the process group that the launcher's environment describes; returns the device.

    Raises:
        FPOError: fewer GPUs on this host than ranks, or the port is taken that rank 0 listens at.
    """
    cuda, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    host = socket.gethostname()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif local_rank >= torch.cuda.device_count():
        raise FPOError(
            f"{host} has {torch.cuda.device_count()} GPUs, and a rank there wants one more; lower "
            f"its slots in resources.hostfile"
        )
    import deepspeed

    # Else DeepSpeed compiles a shared-memory all-reduce when it first starts on a CPU, which takes
    # a C++ compiler and most of a minute, and serves several ranks of one machine only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise FPOError(
            f"port {os.environ['MASTER_PORT']} is in use on {host}, where rank 0 listens for the "
            f"others; give resources.master_port one that is free, or leave it out"
        ) from error
    return f"cuda:{local_rank}" if cuda else "cpu"


def make_engine(
    model: Any,
    hookpoints: Sequence[Hookpoint],
    settings: TrainSettings,
    steps: int,
    *,
    half: bool,
    offload: Offload = "none",
) -> Any:
    """Wrap a float32 model for training.

    Args:
        model: the policy, loaded in float32: its weights become the masters.
        hookpoints: where the SAEs read.
        settings: the recipe's ``train`` section.
        steps: optimizer steps of the run.
        half: compute in bfloat16, with float32 masters.
        offload: what is kept in the CPU's memory.
    """
    import deepspeed

    model.train()
    model.apply(_without_dropout)
    if settings.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})

    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: lr_factor(settings, step, steps)
        )

    policy = Policy(model, hookpoints)
    if settings.zero_stage == 3:
        # The head is used without its module's forward: ZeRO has to be told to gather it.
        head = model.get_output_embeddings().weight
        deepspeed.zero.register_external_parameter(policy, head)  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=_optimizer(model, settings),
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": 1,  # ours vary; who calls backward scales the loss
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": settings.zero_stage, **_offloaded(offload)},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": settings.max_grad_norm,
            "bf16": {"enabled": half},
            "steps_per_print": sys.maxsize,
        },
    )
    return engine


def _offloaded(what: Offload) -> dict[str, Any]:
    place = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    optimizer = {} if what == "none" else {"offload_optimizer": place}
    return {**optimizer, "offload_param": place} if what == "all" else optimizer


def lr_factor(settings: TrainSettings, step: int, steps: int) -> float:
    """Share of the peak learning rate at a step.

    Args:
        settings: the recipe's ``train`` section.
        step: optimizer steps done, from 0.
        steps: of the run.
    """
    warmup = min(settings.warmup_steps, steps)
    if step < warmup or settings.schedule == "constant":
        return min(1.0, (step + 1) / (warmup + 1))
    left = max(0, steps - step) / max(1, steps - warmup)
    return left if settings.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def set_schedule(engine: Any, step: int) -> None:
    """Put the learning rate where it is after ``step`` optimizer steps: it follows from them."""
    schedule = engine.lr_scheduler
    schedule.last_epoch = step
    factors = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * factor(step) for base, factor in factors]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def fp32_grad_norm(engine: Any) -> float | None:
    """The unclipped gradient's norm on the plain float32 path, where DeepSpeed reports none."""
    if engine.bfloat16_enabled() or engine.zero_optimization_stage():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads))


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    kinds: dict[str, Any] = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
    }
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fused = {} if settings.optimizer == "rmsprop" else {"fused": True}
    return kinds[settings.optimizer](parameters, lr=settings.lr, **fused)


def _without_dropout(module: Any) -> None:
    """The invariant at step 0 needs policy = reference, in training mode too."""
    if hasattr(module, "attention_dropout"):
        module.attention_dropout = 0.0
    elif isinstance(module, nn.Dropout):
        module.p = 0.0
