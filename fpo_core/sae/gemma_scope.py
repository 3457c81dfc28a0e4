"""Gemma Scope's own file format: one ``params.npz`` of a JumpReLU SAE.

    gemma-scope-2b-pt-res/layer_25/width_16k/average_l0_55/params.npz

holds five float32 arrays, unscaled, and b_dec is not subtracted from the input. Nothing in the file
says where the SAE reads: the path does, as far as it is kept as it was published.

Shapes: F = d_sae.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fpo_core.errors import FPOError
from fpo_core.sae.config import SaeConfig

PARAMS_FILE = "params.npz"
ARRAYS = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
# A factor on the input that some files carry; all ones wherever sae-lens takes it.
SCALING = "scaling_factor"

_LAYER = re.compile(r"layer_(\d+)")
_RELEASE = re.compile(r"gemma-scope-[\w.]+-(?:pt|it)-([a-z]+)")
# The sites as sae-lens names them, like the hook names of its own format.
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
# Folder names of dictionaries that predict another tensor than the one they read.
_NO_SAE = re.compile(r"transcoder|crosscoder|(?:^|[-_])clt(?:[-_]|$)", re.IGNORECASE)
_NEAR = 5  # folders above the weights: release, layer, width, L0, and one of the user's


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the five arrays, from their headers: no weights are read.

    Args:
        file: the ``params.npz``.

    Raises:
        FPOError: damaged, or not the arrays of such an SAE.
    """
    with _damage_told(file), zipfile.ZipFile(file) as archive:
        headers = {
            array_name(member): _header(archive, member)
            for member in archive.namelist()
        }  # fmt: skip
    _check_names(file, set(headers))
    for name, (_, dtype) in headers.items():
        if dtype.kind != "f":
            raise FPOError(f"SAE {file}: {name} is of dtype {dtype}, it should be float32")
    shapes = {name: headers[name][0] for name in ARRAYS}
    if len(shapes["W_enc"]) != 2:
        raise FPOError(f"SAE {file}: W_enc has the shape {shapes['W_enc']}, not [d_in, d_sae]")
    d_in, d_sae = shapes["W_enc"]
    wanted = {
        "W_enc": (d_in, d_sae), "b_enc": (d_sae,), "threshold": (d_sae,),
        "W_dec": (d_sae, d_in), "b_dec": (d_in,),
    }  # fmt: skip
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise FPOError(
                f"SAE {file}: {name} has the shape {shapes[name]}; beside W_enc {(d_in, d_sae)} "
                f"it should be {shape}"
            )
    return shapes


def read_arrays(file: Path, *, decoder: bool) -> dict[str, np.ndarray]:
    """The arrays in float32, checked to fit together.

    Args:
        file: the ``params.npz``.
        decoder: whether to read W_dec, half of the file.

    Raises:
        FPOError: damaged, or not what ``SparseCoder`` computes.
    """
    read_shapes(file)
    with _damage_told(file), np.load(file, allow_pickle=False) as arrays:
        found = {
            array_name(name): np.asarray(arrays[name], dtype=np.float32)
            for name in arrays.files
            if decoder or array_name(name) != "W_dec"
        }
    if SCALING in found and not np.allclose(found.pop(SCALING), 1.0):
        raise FPOError(
            f"SAE {file}: a {SCALING} other than 1 is not supported; fold it into the weights"
        )
    return found


def read_config(file: Path) -> SaeConfig:
    """What such an SAE is: every one was trained on texts with a BOS token in front.

    Raises:
        FPOError: damaged, or not the arrays of such an SAE.
    """
    d_in, d_sae = read_shapes(file)["W_enc"]
    return SaeConfig(
        "jumprelu", d_in, d_sae, centred=False, hook=declared_hook(file), prepend_bos=True
    )


def declared_hook(file: Path) -> str:
    """Return the hook that the path names, in sae-lens' words.

    ``blocks.25.hook_resid_post``; ``blocks.25`` where it names the layer alone, "" where neither.
    The path counts as it is written: a download cache's links end in names that say nothing.

    Raises:
        FPOError: the path names something that is no SAE, or a site that is not known.
    """
    parts = file.absolute().parts
    if "embedding" in parts[-4:]:
        return "hook_embed"
    layer = next((found[1] for part in reversed(parts) if (found := _LAYER.fullmatch(part))), None)
    site = next((found[1] for part in reversed(parts) if (found := _RELEASE.search(part))), None)
    if site is None:
        refuse_by_folder(file)
    elif site not in _HOOKS:
        raise unknown_site(file, site, tuple(_HOOKS))
    if layer is None:
        return ""
    return f"blocks.{int(layer)}.{_HOOKS[site]}" if site else f"blocks.{int(layer)}"


def refuse_by_folder(file: Path) -> None:
    """Raise if a folder near the weights is named after transcoders or crosscoders.

    Args:
        file: the weights.
    """
    for part in file.absolute().parts[-_NEAR - 1 : -1]:
        if _NO_SAE.search(part):
            raise FPOError(
                f"SAE {file}: its folder {part!r} holds transcoders or crosscoders. They predict "
                f"another tensor than the one they read, so they are not supported. Choose an SAE"
            )


def unknown_site(file: Path, site: str, known: tuple[str, ...]) -> FPOError:
    """Return the error for a site in a path of Gemma Scope that is not in its table.

    Args:
        file: the weights.
        site: as the path has it.
        known: the sites of SAEs in that release.
    """
    is_no_sae = _NO_SAE.search(site)
    kind = "transcoders or crosscoders" if is_no_sae else "an unknown site"
    rename = "" if is_no_sae else ", or rename the folder if it is one"
    return FPOError(
        f"SAE {file}: its path names {site!r}, {kind}. SAEs are in {', '.join(known)}. Choose one "
        f"of these{rename}"
    )


def _check_names(file: Path, found: set[str]) -> None:
    missing = [name for name in ARRAYS if name not in found]
    if missing:
        raise FPOError(
            f"SAE {file}: {', '.join(missing)} missing, so it is no SAE of Gemma Scope, whose "
            f"arrays are {', '.join(ARRAYS)}"
        )
    unknown = sorted(found - {*ARRAYS, SCALING})
    if unknown:
        raise FPOError(f"SAE {file}: what the array {', '.join(unknown)} does is not supported")


def array_name(member: str) -> str:
    """An array's name; some files have ``w_enc`` and ``w_dec``."""
    name = member.removesuffix(".npy")
    return f"W_{name[2:]}" if name.startswith("w_") else name


def _header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    return shape, dtype


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise FPOError(
            f"SAE {file}: damaged or cut short ({error}). Fetch the file again"
        ) from error
