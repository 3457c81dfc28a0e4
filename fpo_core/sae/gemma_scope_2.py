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
from fpo_core.sae.gemma_scope import refuse_by_folder, unknown_site
from fpo_core.sae.safetensors_file import read_shapes

PARAMS_FILE, CONFIG_FILE = "params.safetensors", "config.json"

_RELEASE = "gemma-scope-2-"
_LAYER = re.compile(r"layer_(\d+)(?:_.*)?")
_HOOKS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}


def parse_config(given: dict[str, Any], file: Path) -> SaeConfig:
    """Return what the SAE declares.

    Args:
        given: content of its ``config.json``; empty where there is none.
        file: its ``params.safetensors``.

    Raises:
        FPOError: a transcoder, another architecture, or no such SAE's weights.
    """
    _refuse_declared(given, file)
    hook = _hook_of_path(file)
    shapes = read_shapes(file)
    if len(shapes.get("w_enc", ())) != 2:
        raise FPOError(
            f"SAE {file}: no w_enc [d_in, d_sae] in it, so it is no SAE of Gemma Scope 2"
        )
    d_in, d_sae = shapes["w_enc"]
    return SaeConfig(
        "jumprelu",
        d_in,
        d_sae,
        centred=False,
        hook=hook,
        hf_hook=str(given.get("hf_hook_point_in") or ""),
        prepend_bos=True,
    )


def _refuse_declared(given: dict[str, Any], file: Path) -> None:
    kind = given.get("architecture", "jump_relu")
    if kind != "jump_relu":
        raise FPOError(
            f"SAE {file.parent}: architecture {kind!r} is not supported; choose a JumpReLU SAE"
        )
    out = given.get("hf_hook_point_out")
    if out and out != given.get("hf_hook_point_in"):
        raise FPOError(
            f"SAE {file.parent}: a transcoder (to {out}) is not supported; choose a JumpReLU SAE"
        )
    if given.get("affine_connection"):
        raise FPOError(
            f"SAE {file.parent}: a transcoder (affine_connection=true) is not supported; choose a "
            f"JumpReLU SAE"
        )
    kind = given.get("type", "sae")
    if kind != "sae":
        raise FPOError(f"SAE {file.parent}: type {kind!r} is not supported; choose one of type sae")


def _hook_of_path(file: Path) -> str:
    *above, site, folder, _ = ("", "", *file.absolute().parts)
    layer = _LAYER.fullmatch(folder)
    published = site.removesuffix("_all")  # every layer's, in fewer widths
    if published in _HOOKS:
        return f"blocks.{layer[1]}.{_HOOKS[published]}" if layer else ""
    if layer and any(_RELEASE in part for part in above):
        raise unknown_site(file, site, tuple(_HOOKS))
    refuse_by_folder(file)
    return f"blocks.{layer[1]}" if layer else ""
