"""sparsify's file format: ``cfg.json`` and ``sae.safetensors`` of a TopK SAE.

It takes b_dec from the input whatever ``normalize_decoder`` says, and W_dec is [d_sae, d_in]. The
loader of sae-lens 6.54.12 does neither, so these files are read here, as sparsify reads them.

The folder's name is the hookpoint: ``layers.10``, ``layers.10.mlp``, ``h.3``.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_core.errors import FPOError
from fpo_core.sae.config import SaeConfig, read_count
from fpo_core.sae.gemma_scope import refuse_by_folder

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
    name = str(folder)
    d_in, k = read_count(given, "d_in", name), read_count(given, "k", name)
    if given.get("num_latents"):
        d_sae = read_count(given, "num_latents", name)
    else:
        d_sae = d_in * read_count(given, "expansion_factor", name)
    if "transcode" not in given:  # before it was a setting, only the name said it
        refuse_by_folder(folder / WEIGHTS_FILE)
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
