"""The frozen reference beside the policy, for objectives with a KL: in inference mode, sharded.

Under ZeRO-3 its blocks are dealt to the ranks like the policy's and gathered as they run. The head
stays whole on every rank: the KL is computed in the policy's forward pass, where ZeRO would not
gather another model's weight.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fpo_core.data.batches import PairBatch
from fpo_core.logprobs import output_head
from fpo_core.models.forward import ReferenceSide, reference_side, scored_hidden
from fpo_core.models.load import load_model
from fpo_core.training.job import TrainingJob

LiveReference = Callable[[PairBatch], ReferenceSide]


def load_live_reference(job: TrainingJob, device: str) -> LiveReference:
    """Load the reference as the caches were made with it.

    Args:
        job: the run: model, dtype and ZeRO stage.
        device: torch device of this rank.

    Returns:
        Gives the reference side of a batch, without gradient.
    """
    sharded = job.settings.zero_stage == 3
    model = load_model(
        job.model_folder, dtype=job.reference_dtype, attention=job.attention,
        device="cpu" if sharded else device,
    )  # fmt: skip
    return _sharded(model, device) if sharded else functools.partial(reference_side, model)


class _ScoredHidden(nn.Module):
    """The model up to its head, as a module that ZeRO-3 can hook."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch) -> torch.Tensor:
        return scored_hidden(self.model, batch)


def _sharded(model: Any, device: str) -> LiveReference:
    import deepspeed

    head = output_head(model)
    head = head._replace(weight=head.weight.detach().to(device, copy=True))
    engine, *_ = deepspeed.initialize(
        model=_ScoredHidden(model),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": model.dtype == torch.bfloat16},
        },
    )
    engine.eval()

    @torch.no_grad()
    def reference_of(batch: PairBatch) -> ReferenceSide:
        return ReferenceSide(engine(batch), head)

    return reference_of
