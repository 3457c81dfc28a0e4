"""The file formats of SAEs that are read directly, and which one a folder is in.

| format | files |
|---|---|
| sae-lens | ``cfg.json``, ``sae_weights.safetensors`` |
| sparsify | ``cfg.json``, ``sae.safetensors`` |
| Gemma Scope | ``params.npz`` |
| Gemma Scope 2 | ``params.safetensors``; ``config.json`` where there is one |
| dictionary_learning | ``config.json``, ``ae.pt`` |

Next to a training checkpoint of sae-lens, ``activation_scaler.json`` has the factor on activations.

No torch is imported here: planning reads configurations and widths only.
"""

import json
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fpo_core.errors import FPOError
from fpo_core.models.source import how_to_make
from fpo_core.sae import dictionary_learning, gemma_scope, gemma_scope_2, sparsify
from fpo_core.sae.config import SaeConfig, parse_config

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"
_WEIGHTS = (
    WEIGHTS_FILE,
    sparsify.WEIGHTS_FILE,
    gemma_scope.PARAMS_FILE,
    gemma_scope_2.PARAMS_FILE,
    dictionary_learning.WEIGHTS_FILE,
)
_DEPTH, _SHOWN, _LOOKED_AT = 3, 3, 10_000  # of a folder that holds SAEs further down

Format = Literal["sae-lens", "sparsify", "Gemma Scope", "Gemma Scope 2", "dictionary_learning"]


class SaeFiles(NamedTuple):
    """The files of one SAE."""

    format: Format
    config: Path | None  # None where the path of the weights is all that says something
    weights: Path
    scaler: Path | None = None  # sae-lens': the factor on activations of unfinished training

    @property
    def digested(self) -> dict[str, Path]:
        """What identifies the SAE, by name."""
        given = (self.config, self.weights, self.scaler)
        if self.format == "Gemma Scope":
            return {gemma_scope.PARAMS_FILE: self.weights}
        return {file.name: file for file in given if file}


def find_files(place: Path) -> SaeFiles:
    """Find the files of an SAE.

    Args:
        place: its folder; of Gemma Scope, the file itself serves too.

    Raises:
        FPOError: there are none; the message says what is there instead.
    """
    if place.suffix == ".npz" and place.is_file():
        return SaeFiles("Gemma Scope", None, place)
    config = place / CONFIG_FILE
    if config.is_file():
        if (place / WEIGHTS_FILE).is_file():
            scaler = place / SCALER_FILE
            return SaeFiles(
                "sae-lens", config, place / WEIGHTS_FILE, scaler if scaler.is_file() else None
            )
        if (place / sparsify.WEIGHTS_FILE).is_file():
            return SaeFiles("sparsify", config, place / sparsify.WEIGHTS_FILE)
        raise FPOError(
            f"SAE {str(place)!r}: no {WEIGHTS_FILE} (sae-lens) or {sparsify.WEIGHTS_FILE} "
            f"(sparsify) beside its {CONFIG_FILE}; fetch the file again"
        )
    if (place / gemma_scope.PARAMS_FILE).is_file():
        return SaeFiles("Gemma Scope", None, place / gemma_scope.PARAMS_FILE)
    if (place / gemma_scope_2.PARAMS_FILE).is_file():
        config = place / gemma_scope_2.CONFIG_FILE
        weights = place / gemma_scope_2.PARAMS_FILE
        return SaeFiles("Gemma Scope 2", config if config.is_file() else None, weights)
    weights = place / dictionary_learning.WEIGHTS_FILE
    if weights.is_file() and (place / dictionary_learning.CONFIG_FILE).is_file():
        config = place / dictionary_learning.CONFIG_FILE
        return SaeFiles("dictionary_learning", config, weights)
    raise FPOError(f"SAE {str(place)!r}: {_why_none(place)}{how_to_make(place)}")


def _why_none(place: Path) -> str:
    """Return why a place is no SAE's folder, and what to give instead."""
    if not place.exists():
        return "it does not exist. Check the path, or give release:sae_id of sae-lens' directory"
    if place.is_file():
        if place.name in (*_WEIGHTS, CONFIG_FILE, "config.json"):
            return f"it is a file of an SAE. Give its folder, {str(place.parent)!r}"
        return f"it is a file of an unknown format. {_formats()}"
    missing = _missing(place)
    if missing:
        return missing
    found = list(islice(_saes_below(place), _SHOWN + 1))
    if found:
        more = " and more" if len(found) > _SHOWN else ""
        shown = ", ".join(repr(str(folder)) for folder in found[:_SHOWN])
        return f"it is no SAE's folder, but has SAEs in {shown}{more}. Give one of these"
    has = sorted(child.name for child in islice(place.iterdir(), _LOOKED_AT))
    if not has:
        return f"the folder is empty. {_formats()}"
    more = ", ..." if len(has) > 5 else ""
    return f"it holds {', '.join(has[:5])}{more}, which is no format that is read. {_formats()}"


def _missing(folder: Path) -> str:
    """Return which file weights lack, "" where there are none of a known format."""
    wanted = {
        WEIGHTS_FILE: CONFIG_FILE,
        sparsify.WEIGHTS_FILE: CONFIG_FILE,
        dictionary_learning.WEIGHTS_FILE: dictionary_learning.CONFIG_FILE,
    }
    for weights, config in wanted.items():
        if (folder / weights).is_file():
            return f"it has {weights} without {config}. Fetch {config} into the same folder"
    return ""


def _saes_below(folder: Path) -> Iterator[Path]:
    """Yield the SAEs' folders in a folder, down to a depth, looking at so many entries at most."""
    level = [folder]
    for _ in range(_DEPTH + 1):
        children = [
            child
            for parent in level
            for child in sorted(islice(parent.iterdir(), _LOOKED_AT))
            if child.is_dir() and not child.is_symlink() and os.access(child, os.R_OK | os.X_OK)
        ]
        level = children[:_LOOKED_AT]
        for child in level:
            if any((child / name).is_file() for name in _WEIGHTS):
                yield child


def _formats() -> str:
    return (
        f"Formats that are read: sae-lens ({CONFIG_FILE}, {WEIGHTS_FILE}), sparsify "
        f"({CONFIG_FILE}, {sparsify.WEIGHTS_FILE}), Gemma Scope ({gemma_scope.PARAMS_FILE}), Gemma "
        f"Scope 2 ({gemma_scope_2.PARAMS_FILE}), dictionary_learning "
        f"({dictionary_learning.CONFIG_FILE}, {dictionary_learning.WEIGHTS_FILE})"
    )


def read_config(files: SaeFiles) -> SaeConfig:
    """What an SAE declares, without reading its weights.

    Raises:
        FPOError: damaged, or something is declared that is not honoured.
    """
    name = str(files.weights if files.format == "Gemma Scope" else files.weights.parent)
    config = _parsed(files, name)
    if config.k is not None and config.k > config.d_sae:
        raise FPOError(
            f"SAE {name}: k={config.k} of its cfg.json is more than its {config.d_sae} features; "
            f"fetch the file again"
        )
    return config


def _parsed(files: SaeFiles, name: str) -> SaeConfig:
    given = _json(files.config) if files.config else {}
    match files.format:
        case "sae-lens":
            return parse_config(given, name, input_scale=_input_scale(files))
        case "sparsify":
            return sparsify.parse_config(given, files.weights.parent)
        case "Gemma Scope":
            return gemma_scope.read_config(files.weights)
        case "Gemma Scope 2":
            return gemma_scope_2.parse_config(given, files.weights)
        case "dictionary_learning":
            return dictionary_learning.parse_config(given, files.weights)


def _input_scale(files: SaeFiles) -> float | None:
    """Return the factor on activations; None if there is none, as after the end of training."""
    if files.scaler is None:
        return None
    given = _json(files.scaler)
    if given.get("has_whitening"):
        raise FPOError(
            f"SAE {files.scaler}: has_whitening=true is not supported. Fold it in with sae-lens' "
            f"fold_activation_whitening and save the SAE again"
        )
    factor = given.get("scaling_factor")
    if factor is None:
        return None
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 0 < factor < math.inf:
        raise FPOError(
            f"SAE {files.scaler}: scaling_factor is {factor!r}, expected a positive number. Fetch "
            f"the file again"
        )
    return float(factor)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FPOError(f"SAE {path}: not JSON (line {error.lineno}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise FPOError(f"SAE {path}: not JSON (no text at all); fetch the file again") from error
    if not isinstance(found, dict):
        raise FPOError(f"SAE {path}: not an object of settings; fetch the file again")
    return found
