"""Read activations where an SAE was trained: hookpoints on Hugging Face models.

``resid_post`` at layer l is the output of decoder block l, before the final norm. ``mlp_out`` is
what the block's MLP adds to the residual stream. ``final_norm`` is the last hidden state *after*
the final norm (``hidden_states[-1]`` of transformers): no residual-stream SAE was trained there; it
is what the authors' public code encodes, and here only to compare with that. Which modules they
are: ``fpo_core/models/architectures.py``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.architectures import architecture_of, decoder_layers


class StopForward(Exception):
    """Raised inside a hook to end a forward pass after the deepest layer that is needed."""


class Capture:
    """Holds the activations that the hooks last saw, by hookpoint."""

    def __init__(self) -> None:
        self._values: dict[Hookpoint, Tensor] = {}

    def __getitem__(self, hookpoint: Hookpoint) -> Tensor:
        """The captured activation [batch, tokens, d_model]."""
        assert hookpoint in self._values, f"{hookpoint} has not run"
        return self._values[hookpoint]

    def __len__(self) -> int:
        """Hookpoints seen so far."""
        return len(self._values)

    def store(self, hookpoint: Hookpoint, value: Tensor) -> None:
        """Keep the activation of this forward pass."""
        self._values[hookpoint] = value


def hooked_module(model: Any, hookpoint: Hookpoint) -> nn.Module:
    """The module whose output is the hookpoint's activation.

    Raises:
        FPOError: an architecture without known places, or no such layer.
    """
    architecture, layers = architecture_of(model), decoder_layers(model)
    if not 0 <= hookpoint.layer < len(layers):
        raise FPOError(
            f"sae: there is no layer {hookpoint.layer}, the model has layers 0 to {len(layers) - 1}"
        )
    match hookpoint.site:
        case "resid_post":
            return layers[hookpoint.layer]
        case "mlp_out":
            return layers[hookpoint.layer].get_submodule(architecture.mlp_out)
        case "final_norm":
            return model.get_decoder().get_submodule(architecture.norm)


@contextmanager
def capture_activations(
    model: Any, hookpoints: Sequence[Hookpoint], *, stop: bool = False
) -> Iterator[Capture]:
    """Capture activations at the hookpoints while the context is open.

    Args:
        model: a causal LM.
        hookpoints: where, each once.
        stop: end the forward pass when all are captured (raises StopForward, which the caller
            catches).

    Raises:
        FPOError: when the model has no such place.
    """
    capture = Capture()

    def hook_of(hookpoint: Hookpoint) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # transformers 5 returns a Tensor here, older releases a tuple: `output[0]` on a Tensor
            # would silently take the first row of the batch.
            value = output[0] if isinstance(output, tuple) else output
            assert isinstance(value, Tensor)
            assert value.ndim == 3
            capture.store(hookpoint, value)
            if stop and len(capture) == len(hookpoints):
                raise StopForward

        return hook

    modules = [(hooked_module(model, hookpoint), hookpoint) for hookpoint in hookpoints]
    handles = [module.register_forward_hook(hook_of(point)) for module, point in modules]
    try:
        yield capture
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations_at(model: Any, hookpoint: Hookpoint, input_ids: Tensor) -> Tensor:
    """The activations [batch, tokens, d_model] of rows without padding; later blocks do not run."""
    capturing = capture_activations(model, [hookpoint], stop=True)
    with capturing as capture, suppress(StopForward):
        model(input_ids=input_ids, use_cache=False)
    return capture[hookpoint]


def resid_post(model: Any, layer: int, input_ids: Tensor) -> Tensor:
    """The residual stream [batch, tokens, d_model] after block ``layer``; later ones do not run."""
    return activations_at(model, Hookpoint(layer), input_ids)
