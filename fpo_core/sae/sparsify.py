"""sparsify's file format: ``cfg.json`` and ``sae.safetensors`` of a TopK SAE.

It takes b_dec from the input whatever ``normalize_decoder`` says, and W_dec is [d_sae, d_in]. The
loader of sae-lens 6.54.12 does neither, so these files are read here, as sparsify reads them.

The folder's name is the hookpoint: ``layers.10``, ``layers.10.mlp``, ``h.3``.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_core.errors import FPOError
from fpo_core.sae.config import SaeConfig

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "sae.safetensors"

_HONOURED = {"activation", "d_in", "expansion_factor", "k", "num_latents", "signed"}
# normalize_decoder and multi_topk are of training.
_IGNORED = {"gram_table_hash", "lookup_max_order", "multi_topk", "normalize_decoder"}
# What they do to the features or the reconstruction is not done here.
_REFUSED = ("embed_skip", "gram_lookup", "signed", "skip_connection", "transcode")

_HOOKPOINT = re.compile(r"(?:[\w.]+\.)?(?:layers|h)[._]\d+(?:\.[\w.]+)?|embed_tokens|wte")
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec",
          "decoder.bias": "b_dec"}  # fmt: skip


def parse_config(given: dict[str, Any], folder: Path) -> SaeConfig:
    """Read a ``cfg.json`` of sparsify.

    Args:
        given: the file's content.
        folder: the SAE's, whose name says where it reads.

    Raises:
        FPOError: something is declared that is not honoured here, or not known.
    """
    unknown = sorted(given.keys() - _HONOURED - _IGNORED - set(_REFUSED))
    if unknown:
        raise FPOError(
            f"SAE {folder}: what {', '.join(unknown)} of its cfg.json does to its features is not "
            f"known; if it does nothing, remove it from the file"
        )
    refused = [key for key in _REFUSED if given.get(key)]
    if refused or given.get("activation", "topk") != "topk":
        said = f"{refused[0]}=true" if refused else f"activation={given['activation']!r}"
        raise FPOError(
            f"SAE {folder}: {said} is not supported; choose a plain TopK SAE of sparsify's"
        )
    try:
        d_in, k = int(given["d_in"]), int(given["k"])
        d_sae = int(given.get("num_latents") or d_in * given["expansion_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise FPOError(
            f"SAE {folder}: d_in, k, num_latents or expansion_factor of its cfg.json is missing or "
            f"no count ({error}), so it is not sparsify's; fetch the file again"
        ) from error
    # The folder of a fetched one is RELEASE--HOOKPOINT.
    place = folder.absolute().name.rpartition("--")[2]
    hook = place.replace("layers_", "layers.") if _HOOKPOINT.fullmatch(place) else ""
    return SaeConfig("topk", d_in, d_sae, centred=True, hook=hook, k=k)


def named_weights(state: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The weights as sae-lens names and lays them out.

    Args:
        state: content of the weights file, of any of sparsify's versions.
    """
    import torch

    found = {_NAMES.get(name, name): value for name, value in state.items()}
    if "encoder.weight" in state:
        found["W_enc"] = state["encoder.weight"].T
        found.setdefault("b_enc", torch.zeros(len(state["encoder.weight"])))
    if "decoder.weight" in state:
        found["W_dec"] = state["decoder.weight"].T
    return found
