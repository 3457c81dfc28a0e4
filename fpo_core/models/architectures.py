"""Where the places that SAEs read are in each architecture's modules: the one table of them.

A further architecture is a row here, and a case in ``tests/fpo_core/test_architectures.py``.
"""

from typing import Any, NamedTuple

from torch import nn

from fpo_core.errors import FPOError


class Architecture(NamedTuple):
    """Paths of modules: of the blocks and the norm below the text decoder."""

    blocks: str  # the list of decoder blocks; a block's output is ``resid_post``
    norm: str  # the final norm
    # Below a block: the module whose output the block adds to the residual stream for its MLP.
    mlp_out: str


_LLAMA = Architecture("layers", "norm", "mlp")
# Gemma-2 and Gemma-3 norm what the MLP gives before they add it; the SAEs were trained after that.
_GEMMA = Architecture("layers", "norm", "post_feedforward_layernorm")

# By ``model_type`` of the text decoder's configuration: that inside Gemma-3's multimodal class is
# ``gemma3_text``, as the text model is by itself.
ARCHITECTURES = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Architecture("h", "ln_f", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def architecture_of(model: Any) -> Architecture:
    """Where the places are in a causal LM.

    Raises:
        FPOError: for an architecture that the table does not have.
    """
    kind = model.get_decoder().config.model_type
    if kind not in ARCHITECTURES:
        raise FPOError(
            f"{type(model).__name__}: where SAEs read in the architecture {kind!r} is not known; "
            f"supported: {', '.join(ARCHITECTURES)}. Choose a model of these, or add the "
            f"architecture to fpo_core/models/architectures.py"
        )
    return ARCHITECTURES[kind]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The model's list of decoder blocks.

    Raises:
        FPOError: for an architecture that the table does not have.
    """
    return model.get_decoder().get_submodule(architecture_of(model).blocks)
