"""The state of an SAE's training, on disk: a training that was killed goes on from it.

Weights and torch's random state as safetensors, the rest as sae-lens' trainer writes and reads it
(optimizer, schedulers, counters of how often features fire). The order of the activations follows
from the step. On a CPU the SAE of a resumed training is the uninterrupted one's to the last bit.
"""

from pathlib import Path
from typing import Any, Protocol

import torch

from fpo_core.errors import FPOError

SAE_FILE = "sae.safetensors"
RNG = "random_state"  # beside the SAE's parameters


class Saver(Protocol):
    """Keeps the states of a training."""

    def newest(self) -> Path | None:
        """The folder of the state to go on from."""
        ...

    def due(self) -> bool:
        """Whether it is time to save."""
        ...

    def save(self, trainer: Any) -> None:
        """Keep the state of sae-lens' trainer; what cannot be kept does not end training."""
        ...


def save_training(trainer: Any, folder: Path) -> list[Path]:
    """Write a trainer's state between two steps; returns the files.

    Args:
        trainer: sae-lens' ``SAETrainer``.
        folder: is made; what is in it is written over.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in trainer.sae.state_dict().items()}
    save_file({**state, RNG: torch.get_rng_state()}, folder / SAE_FILE)
    trainer.save_trainer_state(folder)
    return sorted(path for path in folder.iterdir() if path.is_file())


def load_training(trainer: Any, folder: Path) -> None:
    """Put a saved state into a trainer of the same settings.

    Raises:
        FPOError: it cannot be read, or is of an SAE of other shapes.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / SAE_FILE)
        torch.set_rng_state(state.pop(RNG))
        trainer.sae.load_state_dict(state)
        trainer.load_trainer_state(folder)  # torch.load, which takes tensors and numbers alone
    except (OSError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise FPOError(
            f"the saved state of the SAE's training in {str(folder)!r} cannot be used ({error}); "
            f"`fpo run --only sae --force` trains from the start"
        ) from error
