"""Gemma Scope 2's file format: ``params.safetensors`` of a JumpReLU SAE for Gemma-3.

    gemma-scope-2-1b-pt/resid_post/layer_13_width_16k_l0_medium/params.safetensors

Where it reads is in the ``config.json`` beside it, as a module path of the Hugging Face model;
where there is none, the path says the site and the layer. b_dec is not subtracted from the input.
"""

import re
from pathlib import Path
from typing import Any

from fpo_core.errors import FPOError
from fpo_core.sae.config import SaeConfig
from fpo_core.sae.safetensors_file import read_shapes

PARAMS_FILE, CONFIG_FILE = "params.safetensors", "config.json"

_LAYER = re.compile(r"layer_(\d+)(?:_.*)?")
_HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}


def parse_config(given: dict[str, Any], file: Path) -> SaeConfig:
    """What the SAE declares.

    Args:
        given: content of its ``config.json``; empty where there is none.
        file: its ``params.safetensors``.

    Raises:
        FPOError: a transcoder, another architecture, or no such SAE's weights.
    """
    kind = given.get("architecture", "jump_relu")
    out = given.get("hf_hook_point_out")
    if kind != "jump_relu" or (out and out != given.get("hf_hook_point_in")):
        what = f"architecture {kind!r}" if kind != "jump_relu" else f"a transcoder (to {out})"
        raise FPOError(f"SAE {file.parent}: {what} is not supported; choose a JumpReLU SAE")
    shapes = read_shapes(file)
    if len(shapes.get("w_enc", ())) != 2:
        raise FPOError(
            f"SAE {file}: no w_enc [d_in, d_sae] in it, so it is no SAE of Gemma Scope 2"
        )
    d_in, d_sae = shapes["w_enc"]
    return SaeConfig(
        "jumprelu", d_in, d_sae, centred=False, hook=_hook_of_path(file),
        hf_hook=str(given.get("hf_hook_point_in") or ""), prepend_bos=True,
    )  # fmt: skip


def _hook_of_path(file: Path) -> str:
    *_, site, folder, _ = ("", "", *file.absolute().parts)
    layer = _LAYER.fullmatch(folder)
    site = site.removesuffix("_all")  # every layer's, in fewer widths
    if not layer:
        return ""
    return f"blocks.{layer[1]}" + (f".{_HOOKS[site]}" if site in _HOOKS else "")
