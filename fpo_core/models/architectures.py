"""Where the places that SAEs read are in each architecture's modules: the one table of them.

A further architecture is a row here, and a case in ``tests/fpo_core/test_architectures.py``.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from fpo_core.errors import FPOError

if TYPE_CHECKING:  # the plan reads the table without torch
    from torch import nn


class Architecture(NamedTuple):
    """Paths of modules: of the blocks and the norm below the text decoder."""

    blocks: str  # the list of decoder blocks; a block's output is ``resid_post``
    norm: str  # the final norm
    # Below a block: the module whose output the block adds to the residual stream for its MLP.
    mlp_out: str
    sdpa: bool = True  # False where attention soft-caps its logits or has sinks


_LLAMA = Architecture("layers", "norm", "mlp")
# Gemma-2 and Gemma-3 norm what the MLP gives before they add it; the SAEs were trained after that.
_GEMMA = Architecture("layers", "norm", "post_feedforward_layernorm")
_GEMMA2 = _GEMMA._replace(sdpa=False)
# OLMo norms what attention and MLP give, and not what they read.
_OLMO = _GEMMA

# By ``model_type`` of the text decoder's configuration: that inside Gemma-3's multimodal class is
# ``gemma3_text``, as the text model is by itself.
ARCHITECTURES = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA,
    "gpt2": Architecture("h", "ln_f", "mlp"),
    "gpt_neox": Architecture("layers", "final_layer_norm", "mlp"),
    "gpt_oss": _LLAMA._replace(sdpa=False),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "smollm3": _LLAMA,
}


def architecture_of(model: Any) -> Architecture:
    """Return the row of a causal LM.

    Raises:
        FPOError: an architecture that the table does not have.
    """
    return architecture_named(model.get_decoder().config.model_type)


def architecture_named(kind: str) -> Architecture:
    """Return the row of a text decoder's ``model_type``.

    Raises:
        FPOError: an architecture that the table does not have.
    """
    if kind not in ARCHITECTURES:
        raise FPOError(
            f"the model's architecture {kind!r} is not supported: its hookpoints are not known. "
            f"Supported: {', '.join(ARCHITECTURES)}. Choose a model of these, or add the "
            f"architecture to fpo_core/models/architectures.py"
        )
    return ARCHITECTURES[kind]


def check_attention(kind: str, attention: str) -> None:
    """Refuse an attention implementation that cannot compute the model's attention.

    Args:
        kind: ``model_type`` of the text decoder.
        attention: the recipe's ``model.attention``.

    Raises:
        FPOError: ``sdpa`` for soft-capped logits or attention sinks; an unknown architecture.
    """
    if attention == "sdpa" and not architecture_named(kind).sdpa:
        raise FPOError(
            f"model.attention=sdpa: {kind} soft-caps its attention logits or has attention sinks, "
            f"which SDPA leaves out. Set model.attention to eager"
        )


def decoder_layers(model: Any) -> "nn.ModuleList":
    """Return the model's list of decoder blocks.

    Raises:
        FPOError: for an architecture that the table does not have.
    """
    return model.get_decoder().get_submodule(architecture_of(model).blocks)
