"""Where a published or stored SAE comes from, and what identifies it."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fpo_core.errors import FPOError
from fpo_core.models.source import ModelIdentity, cache_folder, file_digest, how_to_make
from fpo_core.sae.gemma_scope import PARAMS_FILE, read_shapes

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"  # sae-lens' disk format


def is_release(source: str) -> bool:
    """Whether the source is written ``release:sae_id`` (an entry of sae-lens' directory)."""
    return ":" in source and not Path(source).expanduser().exists()


def identify_sae(source: str) -> ModelIdentity:
    """Content identity of an SAE: the digest of its files, once they are here.

    A release that was never fetched is identified by its name and marked unresolved.
    """
    if is_release(source) and not _release_folder(source).is_dir():
        return ModelIdentity(f"sae:{source}", resolved=False)
    place = _release_folder(source) if is_release(source) else local_folder(source)
    params = params_file(place)
    files = {name: place / name for name in (CONFIG_FILE, WEIGHTS_FILE)}
    if params:
        files = {PARAMS_FILE: params}
    parts = {name: file_digest(file) for name, file in files.items()}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return ModelIdentity(f"sae:{digest}")


def read_config(folder: Path) -> dict[str, Any]:
    """The SAE's ``cfg.json``."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FPOError(
            f"SAE {str(folder)!r}: no {CONFIG_FILE} there. Give a folder in sae-lens' disk format "
            f"({CONFIG_FILE}, {WEIGHTS_FILE}), a {PARAMS_FILE} of Gemma Scope or its folder, or "
            f"release:sae_id from sae-lens' directory{how_to_make(folder)}"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise FPOError(f"SAE {path}: not JSON (line {error.lineno}: {error.msg})") from error


def declared_width(source: str) -> int | None:
    """d_sae as the SAE's files declare it; None for a release that was never fetched."""
    if is_release(source) and not _release_folder(source).is_dir():
        return None
    place = _release_folder(source) if is_release(source) else local_folder(source)
    params = params_file(place)
    return read_shapes(params)["W_enc"][1] if params else read_config(place).get("d_sae")


def params_file(place: Path) -> Path | None:
    """The file of an SAE in Gemma Scope's format; None where ``place`` is no such one.

    Args:
        place: of the SAE: a folder, or the file itself.
    """
    if place.suffix == ".npz" and place.is_file():
        return place
    file = place / PARAMS_FILE
    return file if file.is_file() and not (place / CONFIG_FILE).exists() else None


def local_folder(source: str) -> Path:
    """The place of a local SAE, checked to be one: a folder, or a file of Gemma Scope."""
    folder = Path(source).expanduser()
    params = params_file(folder)
    if params:
        read_shapes(params)
        return folder
    read_config(folder)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FPOError(f"SAE {source!r}: no {WEIGHTS_FILE} in the folder")
    return folder


def sae_folder(source: str) -> Path:
    """What ``load_coder`` reads: a local SAE, or a release, fetched through sae-lens.

    Raises:
        FPOError: when it is not there or cannot be fetched.
    """
    if not is_release(source):
        return local_folder(source)
    target = _release_folder(source)
    if target.is_dir():
        return target
    from sae_lens import SAE

    release, _, sae_id = source.partition(":")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    try:
        SAE.from_pretrained(release, sae_id, device="cpu").save_model(scratch)
        scratch.rename(target)
    except Exception as error:
        raise FPOError(
            f"SAE {source!r} could not be fetched ({type(error).__name__}: {error}). Check the "
            f"release and id, and the network; or put its folder here and set sae.source to it"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _release_folder(source: str) -> Path:
    return cache_folder() / "saes" / source.replace("/", "__").replace(":", "--")
