"""Train an SAE with sae-lens on collected activations.

Batch-top-k (Bussmann et al. 2024): k features a token on average over the batch, with sae-lens'
auxiliary loss that revives dead ones; saved as JumpReLU, the form of Gemma Scope.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.errors import FPOError
from fpo_core.progress import Progress
from fpo_core.recipe.schema import SaeTrainSettings
from fpo_core.sae.collect import SINK_FACTOR, Activations
from fpo_core.sae.train_state import Saver, load_training

log = logging.getLogger("fpo.sae")

MOST_LOST = 2.0**-10  # of weights rounded to float16, relative to their norm


class ActivationOrder:
    """Endless batches of activations, each epoch in its own seeded order.

    Args:
        activations: [tokens, d_in].
        rows: the rows to train on.
        batch: rows a batch.
        seed: of the order.
        scale: factor on every value.
    """

    def __init__(
        self, activations: Activations, rows: np.ndarray, batch: int, seed: int, scale: float
    ) -> None:
        self.activations, self.rows, self.batch = activations, rows, batch
        self.seed, self.scale = seed, scale
        self.step = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        per_epoch = len(self.rows) // self.batch
        epoch, index = divmod(self.step, per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        rows = np.sort(self._order[index * self.batch : (index + 1) * self.batch])
        self.step += 1
        return torch.from_numpy(self.activations[rows]) * self.scale


def check_enough(tokens: int, settings: SaeTrainSettings) -> None:
    """Refuse activations that do not fill a batch.

    Args:
        tokens: how many there are to train on.
        settings: the recipe's ``sae.train``.

    Raises:
        FPOError: with what to set.
    """
    if tokens < settings.batch_tokens:
        raise FPOError(
            f"sae.train.batch_tokens={settings.batch_tokens} is more than the {tokens} activations "
            f"that sae.train.text gives for training; set it to {max(1, tokens)} or less, or give "
            f"more text (at most sae.train.max_tokens={settings.max_tokens} are taken)"
        )


class Norms(NamedTuple):
    """What the activations' norms say."""

    rows: np.ndarray  # int64: rows that are no attention sinks
    scale: float  # gives the kept rows a mean norm of sqrt(d_in), as sae-lens normalises


def measure_norms(activations: Activations, *, chunk: int = 65_536) -> Norms:
    """Find the attention sinks and the scale of everything else.

    A few tokens at the start of a text carry a norm a hundred times the others'. One of them in a
    batch outweighs all else in a squared error, and no scored position is one: they are left out.
    """
    norms = np.concatenate(
        [
            np.linalg.norm(activations[start : start + chunk], axis=1)
            for start in range(0, len(activations), chunk)
        ]
    )
    kept = norms < SINK_FACTOR * np.median(norms)
    scale = np.sqrt(activations.shape[1]) / norms[kept].mean()
    return Norms(np.flatnonzero(kept), float(scale))


def train_sae(
    activations: Activations,
    settings: SaeTrainSettings,
    metadata: dict[str, Any],
    folder: Path,
    *,
    device: str = "cpu",
    saver: Saver | None = None,
) -> None:
    """Train and save an SAE in sae-lens' disk format.

    Args:
        activations: [tokens, d_in].
        settings: the recipe's ``sae.train``.
        metadata: what the SAE should declare (model, hook, BOS handling, context size).
        folder: receives ``cfg.json`` and ``sae_weights.safetensors``.
        device: torch device to train on.
        saver: keeps unfinished training, and has what an earlier attempt kept.

    Raises:
        FPOError: fewer activations than a batch takes.
    """
    torch.manual_seed(settings.seed)
    norms = measure_norms(activations)
    check_enough(len(norms.rows), settings)
    order = ActivationOrder(
        activations, norms.rows, settings.batch_tokens, settings.seed, norms.scale
    )
    trainer = _trainer(order, settings, metadata, device)
    begun = saver.newest() if saver else None
    if begun:
        load_training(trainer, begun)
        log.info("SAE training goes on after step %d", trainer.n_training_steps)
    order.step = trainer.n_training_steps
    with Progress(
        "SAE training", total=settings.steps, unit="step", done=order.step
    ) as progress:  # fmt: skip
        while trainer.n_training_steps < settings.steps:
            trainer.maybe_reset_sparsity()
            out = trainer.step(next(order))
            trainer.n_training_steps += 1
            progress.advance(1, note=_note(trainer, out))
            if saver and saver.due() and trainer.n_training_steps < settings.steps:
                saver.save(trainer)
    trainer.set_final_sae_metadata()
    # The SAE learned on scaled activations: folding the scale makes it read the model's own.
    trainer.sae.fold_activation_norm_scaling_factor(norms.scale)
    save_sae(trainer.sae, folder)


def _trainer(
    order: ActivationOrder, settings: SaeTrainSettings, metadata: dict[str, Any], device: str
) -> Any:
    """sae-lens' trainer before its first step; ``b_dec`` is the mean of the first batch."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=order.activations.shape[1],
            d_sae=settings.d_sae,
            k=settings.k,
            device=device,
            dtype="float32",
            apply_b_dec_to_input=True,
            normalize_activations="none",
        )
    )
    for key, value in metadata.items():
        sae.cfg.metadata[key] = value
    with torch.no_grad():
        sae.b_dec.copy_(next(order).mean(0))
    return SAETrainer(
        SAETrainerConfig(
            total_training_samples=settings.steps * settings.batch_tokens,
            train_batch_size_samples=settings.batch_tokens,
            lr=settings.lr,
            lr_end=0.0,
            lr_warm_up_steps=settings.warmup_steps,
            lr_decay_steps=settings.steps // 5,
            device=device,
            dead_feature_window=200,
            feature_sampling_window=500,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        order,
    )


def _note(trainer: Any, out: Any) -> str:
    dead = int(trainer.dead_neurons.sum())
    return f"loss {float(out.loss.detach()):.3f}, {dead} dead"


def save_sae(sae: Any, folder: Path) -> None:
    """Save for inference in sae-lens' disk format.

    In float16, which is half the size, where it holds every tensor. The bias of an SAE of large
    activations is too large for it, and its encoder is too small: such an SAE stays in float32.
    """
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights, config = sae.save_inference_model(str(folder))
    state = load_file(weights)
    dtype = torch.float16 if all(map(_fits_half, state.values())) else torch.float32
    save_file({name: value.to(dtype) for name, value in state.items()}, weights)
    written = json.loads(Path(config).read_text())
    written["dtype"] = str(dtype).removeprefix("torch.")
    written["device"] = "cpu"  # where it was trained is no property of it
    Path(config).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def _fits_half(weights: Tensor) -> bool:
    """Return whether float16 keeps a tensor to its usual precision, 2 ** -11."""
    lost = weights.half().float() - weights
    return bool(lost.norm() <= MOST_LOST * weights.norm())
