"""The file formats of SAEs that are read directly, and which one a folder is in.

| format | files |
|---|---|
| sae-lens | ``cfg.json``, ``sae_weights.safetensors`` |
| sparsify | ``cfg.json``, ``sae.safetensors`` |
| Gemma Scope | ``params.npz`` |
| Gemma Scope 2 | ``params.safetensors``; ``config.json`` where there is one |

No torch is imported here: planning reads configurations and widths only.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fpo_core.errors import FPOError
from fpo_core.models.source import how_to_make
from fpo_core.sae import gemma_scope, gemma_scope_2, sparsify
from fpo_core.sae.config import SaeConfig, parse_config

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"

Format = Literal["sae-lens", "sparsify", "Gemma Scope", "Gemma Scope 2"]


class SaeFiles(NamedTuple):
    """The files of one SAE."""

    format: Format
    config: Path | None  # None where the path of the weights is all that says something
    weights: Path

    @property
    def digested(self) -> dict[str, Path]:
        """What identifies the SAE, by name."""
        given = (self.config, self.weights)
        if self.format == "Gemma Scope":
            return {gemma_scope.PARAMS_FILE: self.weights}
        return {file.name: file for file in given if file}


def find_files(place: Path) -> SaeFiles:
    """The files of an SAE.

    Args:
        place: its folder; of Gemma Scope, the file itself serves too.

    Raises:
        FPOError: there are none.
    """
    if place.suffix == ".npz" and place.is_file():
        return SaeFiles("Gemma Scope", None, place)
    config = place / CONFIG_FILE
    if config.is_file():
        if (place / WEIGHTS_FILE).is_file():
            return SaeFiles("sae-lens", config, place / WEIGHTS_FILE)
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
    raise FPOError(
        f"SAE {str(place)!r}: no {CONFIG_FILE} there. Give a folder in sae-lens' disk format "
        f"({CONFIG_FILE}, {WEIGHTS_FILE}) or sparsify's ({CONFIG_FILE}, {sparsify.WEIGHTS_FILE}), "
        f"a {gemma_scope.PARAMS_FILE} of Gemma Scope or its folder, a folder of Gemma Scope 2 "
        f"({gemma_scope_2.PARAMS_FILE}), or release:sae_id from sae-lens' directory"
        f"{how_to_make(place)}"
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
            return parse_config(given, name)
        case "sparsify":
            return sparsify.parse_config(given, files.weights.parent)
        case "Gemma Scope":
            return gemma_scope.read_config(files.weights)
        case "Gemma Scope 2":
            return gemma_scope_2.parse_config(given, files.weights)


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
