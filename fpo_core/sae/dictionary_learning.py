"""dictionary_learning's file format: ``config.json`` and ``ae.pt``, a dictionary of tensors.

The tensors mean here what sae-lens' loader of such folders makes of them. ``ae.pt`` is a pickle:
it is read with ``weights_only``, which takes tensors and runs no code.

Shapes: F = d_sae.
"""

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fpo_core.errors import FPOError
from fpo_core.sae.config import SaeConfig, read_count

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"


class _Class(NamedTuple):
    """How a class of dictionary_learning encodes."""

    architecture: str
    centred: bool = True  # it subtracts its decoder's bias from the input


_CLASSES = {
    "AutoEncoder": _Class("standard"),
    "AutoEncoderNew": _Class("standard", centred=False),
    "AutoEncoderTopK": _Class("topk"),
    "BatchTopKSAE": _Class("jumprelu"),
    "GatedAutoEncoder": _Class("gated"),
    "JumpReluAutoEncoder": _Class("jumprelu", centred=False),
    "MatryoshkaBatchTopKSAE": _Class("jumprelu"),
}
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
    "bias": "b_dec",
    "decoder_bias": "b_dec",
    "mag_bias": "b_mag",
    "gate_bias": "b_gate",
}
_TURNED = ("encoder.weight", "decoder.weight")  # torch.nn.Linear has [out, in]
_COUNTS = ("k", "group_sizes")  # tensors that say how it was trained

_SUBMODULE = re.compile(r"(resid(?:_post|_out)?|mlp(?:_out)?|attn(?:_out)?)_layer_?(\d+)")
_HOOKS = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}


def parse_config(given: dict[str, Any], file: Path) -> SaeConfig:
    """Read a ``config.json`` of dictionary_learning.

    Args:
        given: the file's content.
        file: the SAE's ``ae.pt``, read for the widths if the configuration has none.

    Raises:
        FPOError: something is declared that is not supported, or no such SAE's files.
    """
    name = str(file.parent)
    trainer, buffer = _section(given, "trainer", name), _section(given, "buffer", name)
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise FPOError(
            f"SAE {name}: dict_class={kind!r} in its {CONFIG_FILE} is not supported; supported: "
            f"{', '.join(_CLASSES)}"
        )
    if buffer.get("io", "out") != "out":
        raise FPOError(
            f"SAE {name}: io={buffer['io']!r} in its {CONFIG_FILE} is not supported. Choose an SAE "
            f"that reads a module's output"
        )
    if "activation_dim" in trainer and "dict_size" in trainer:
        d_in, d_sae = (read_count(trainer, key, name) for key in ("activation_dim", "dict_size"))
    else:
        d_in, d_sae = _widths(read_tensors(file), file)
    architecture, centred = _CLASSES[kind]
    return SaeConfig(
        architecture,
        d_in,
        d_sae,
        centred=centred,
        hook=_hook(trainer, name),
        prepend_bos=bool(buffer.get("add_special_tokens", True)),
        k=read_count(trainer, "k", name) if architecture == "topk" else None,
    )


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """Return the tensors of an ``ae.pt`` as they are stored.

    Raises:
        FPOError: missing or damaged, or it holds something else than tensors by name.
    """
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise FPOError(
            f"SAE {file}: it is damaged or holds more than tensors, which is not loaded, because "
            f"that can run code. Save the dictionary's state_dict()"
        ) from error
    except (OSError, EOFError, RuntimeError) as error:
        raise FPOError(
            f"SAE {file}: it is missing or damaged ({error}). Fetch the file again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise FPOError(f"SAE {file}: not tensors by name. Save the dictionary's state_dict()")
    return state


def named_weights(state: "dict[str, Tensor]", config: SaeConfig) -> "dict[str, Tensor]":
    """Return the weights as sae-lens names and lays them out.

    Args:
        state: content of the weights file.
        config: what the SAE declares.
    """
    found = {
        _NAMES.get(name, name): value.T if name in _TURNED else value
        for name, value in state.items()
        if name not in _COUNTS
    }
    if config.architecture == "topk":  # its encode keeps k, whatever threshold is stored
        found.pop("threshold", None)
    if "threshold" in found and found["threshold"].ndim == 0:
        found["threshold"] = found["threshold"].repeat(config.d_sae)
    return found


def _section(given: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, dict):
        raise FPOError(f"SAE {name}: {key} of its {CONFIG_FILE} is not an object of settings")
    return value


def _widths(state: "dict[str, Tensor]", file: Path) -> tuple[int, int]:
    weight = state["encoder.weight"].T if "encoder.weight" in state else state.get("W_enc")
    if weight is None or weight.ndim != 2:
        raise FPOError(f"SAE {file}: no encoder.weight or W_enc [d_in, d_sae] in it")
    return weight.shape[0], weight.shape[1]


def _hook(trainer: dict[str, Any], name: str) -> str:
    """Return the hook of a trainer's ``submodule_name`` and ``layer``; block outputs by default."""
    layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
    if submodule is None:
        return "" if layer is None else f"blocks.{layer}.hook_resid_post"
    found = _SUBMODULE.fullmatch(str(submodule))
    if not found:
        raise FPOError(
            f"SAE {name}: submodule_name={submodule!r} in its {CONFIG_FILE} is not known. Expected "
            f"resid_post_layer_N or mlp_out_layer_N"
        )
    if layer is not None and str(layer) != found[2]:
        raise FPOError(
            f"SAE {name}: submodule_name={submodule!r} and layer={layer} of its {CONFIG_FILE} "
            f"disagree. Correct the wrong one"
        )
    return f"blocks.{int(found[2])}.{_HOOKS[found[1].partition('_')[0]]}"
