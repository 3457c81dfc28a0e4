"""The weights of an SAE from files of any format, checked against what it declares.

Shapes: F = d_sae.
"""

import torch
from torch import Tensor

from fpo_core.errors import FPOError
from fpo_core.sae import dictionary_learning, gemma_scope, sparsify
from fpo_core.sae.architectures import ARCHITECTURES
from fpo_core.sae.config import SaeConfig
from fpo_core.sae.formats import SaeFiles
from fpo_core.sae.safetensors_file import as_float32, read_tensors

# A factor on the reconstruction that older files carry, all ones unless it was fine-tuned.
_SCALING = "scaling_factor"


def read_weights(files: SaeFiles, config: SaeConfig, *, decoder: bool) -> dict[str, Tensor]:
    """The weights in float32, as sae-lens names them, the decoder's norms folded in.

    Args:
        files: the SAE's.
        config: what it declares.
        decoder: whether to give W_dec too.

    Raises:
        FPOError: damaged, or not the weights of what the SAE declares itself to be.
    """
    if files.format == "Gemma Scope":
        arrays = gemma_scope.read_arrays(files.weights, decoder=decoder)
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        _check_finite(found, files)
        return found
    if files.format == "dictionary_learning":
        stored = dictionary_learning.read_tensors(files.weights)
        state = as_float32(dictionary_learning.named_weights(stored, config), files.weights)
    else:
        state = read_tensors(files.weights)
    if files.format == "sparsify":
        state = sparsify.named_weights(state)
    if files.format == "Gemma Scope 2":
        state = {gemma_scope.array_name(name): value for name, value in state.items()}
    _check(state, config, files)
    _check_finite(state, files)
    if config.input_scale != 1:
        _fold_input_scale(state, config.input_scale)
    if config.rescaled:
        _fold_decoder_norms(state)
    if not decoder:
        del state["W_dec"]
    return state


def _check(state: dict[str, Tensor], config: SaeConfig, files: SaeFiles) -> None:
    name = str(files.weights.parent)
    if _SCALING in state and bool((state.pop(_SCALING) != 1).any()):
        raise FPOError(
            f"SAE {name}: a {_SCALING} other than 1 is not supported; fold it into the weights"
        )
    wanted = ARCHITECTURES[config.architecture].tensors
    missing = next((tensor for tensor in wanted if tensor not in state), None)
    if missing:
        raise FPOError(
            f"SAE {name}: {missing!r} is missing for the architecture {config.architecture!r}"
        )
    unknown = sorted(state.keys() - set(wanted))
    if unknown:
        raise FPOError(
            f"SAE {name}: what {', '.join(unknown)} in {files.weights.name} does is not known for "
            f"the architecture {config.architecture!r}"
        )
    declared = (config.d_in, config.d_sae)
    if tuple(state["W_enc"].shape) != declared:
        said = files.config.name if files.config else "the file"
        raise FPOError(
            f"SAE {name}: weights are {tuple(state['W_enc'].shape)}, {said} says {declared}"
        )
    shapes = {"W_dec": declared[::-1], "b_dec": (config.d_in,)}
    for tensor in wanted[1:]:
        shape = shapes.get(tensor, (config.d_sae,))
        if tuple(state[tensor].shape) != shape:
            raise FPOError(
                f"SAE {name}: {tensor} has the shape {tuple(state[tensor].shape)}, beside W_enc "
                f"{declared} it should be {shape}"
            )


def _check_finite(state: dict[str, Tensor], files: SaeFiles) -> None:
    for name, value in state.items():
        # A threshold of infinity turns a feature off, as one that half precision overflowed.
        fine = ~value.isnan() if name == "threshold" else value.isfinite()
        if not fine.all():
            raise FPOError(
                f"SAE {files.weights.parent}: {name} in {files.weights.name} is damaged: it holds "
                f"values that are not finite (NaN or infinite). Fetch the file again"
            )


def _fold_input_scale(state: dict[str, Tensor], scale: float) -> None:
    """Let the SAE read plain activations, as sae-lens' fold_activation_norm_scaling_factor does."""
    state["W_enc"] = state["W_enc"] * scale
    state["W_dec"] = state["W_dec"] / scale
    state["b_dec"] = state["b_dec"] / scale


def _fold_decoder_norms(state: dict[str, Tensor]) -> None:
    """Make the decoder's rows of length one: pre-activations and top-k are then as declared."""
    norms = state["W_dec"].norm(dim=1).clamp_min(1e-8)
    state["W_enc"] = state["W_enc"] * norms
    state["b_enc"] = state["b_enc"] * norms
    state["W_dec"] = state["W_dec"] / norms[:, None]
