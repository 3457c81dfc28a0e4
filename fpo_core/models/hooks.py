"""Read activations where an SAE was trained: hookpoints on Hugging Face decoder layers.

``resid_post`` at layer l is the output of decoder block l, before the final norm (never
``hidden_states[-1]``, which transformers gives after it).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fpo_core.errors import FPOError


class StopForward(Exception):
    """Raised inside a hook to end a forward pass after the deepest layer that is needed."""


class Capture:
    """Holds the activation that the hook last saw."""

    def __init__(self) -> None:
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The captured activation [batch, tokens, d_model]."""
        assert self._value is not None, "the hooked layer has not run"
        return self._value

    def store(self, value: Tensor) -> None:
        """Keep the activation of this forward pass."""
        self._value = value


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder blocks (Llama, Gemma-2, Gemma-3, Qwen, Mistral layout).

    Raises:
        FPOError: for an architecture whose blocks are not at ``model.layers``.
    """
    layers = getattr(getattr(model, "model", model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise FPOError(
            f"{type(model).__name__}: its decoder blocks are not at `model.layers`, so there is no "
            f"place to read SAE activations; supported: Llama, Gemma-2, Gemma-3, Qwen, Mistral"
        )
    return layers


@contextmanager
def capture_resid_post(model: nn.Module, layer: int, *, stop: bool = False) -> Iterator[Capture]:
    """Capture the residual stream after decoder block ``layer`` while the context is open.

    Args:
        model: a causal LM.
        layer: block index from 0.
        stop: end the forward pass there (raises StopForward, which the caller catches).

    Raises:
        FPOError: when the model has no such layer.
    """
    layers = decoder_layers(model)
    if not 0 <= layer < len(layers):
        raise FPOError(f"layer {layer}: the model has layers 0 to {len(layers) - 1}")
    capture = Capture()

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # transformers 5 returns a Tensor here, older releases a tuple: `output[0]` on a Tensor
        # would silently take the first row of the batch.
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        assert value.ndim == 3
        capture.store(value)
        if stop:
            raise StopForward

    handle = layers[layer].register_forward_hook(hook)
    try:
        yield capture
    finally:
        handle.remove()


@torch.no_grad()
def resid_post(model: nn.Module, layer: int, input_ids: Tensor) -> Tensor:
    """The residual stream [batch, tokens, d_model] after block ``layer``; later ones do not run."""
    with capture_resid_post(model, layer, stop=True) as capture, suppress(StopForward):
        model(input_ids=input_ids, use_cache=False)
    return capture.value
