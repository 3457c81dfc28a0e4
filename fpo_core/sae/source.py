"""Where a published or stored SAE comes from, and what identifies it."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from fpo_core.errors import FPOError
from fpo_core.files import follow_umask
from fpo_core.models.source import ModelIdentity, cache_folder, file_digest
from fpo_core.sae import sparsify
from fpo_core.sae.formats import CONFIG_FILE, WEIGHTS_FILE, find_files, read_config

QUALITY_FILE = "quality.json"  # what was measured of an SAE that was trained here


def is_release(source: str) -> bool:
    """Whether the source is written ``release:sae_id`` (an entry of sae-lens' directory)."""
    return ":" in source and not Path(source).expanduser().exists()


def identify_sae(source: str) -> ModelIdentity:
    """Content identity of an SAE: the digest of its files, once they are here.

    A release that was never fetched is identified by its name and marked unresolved.
    """
    place = _place(source)
    if place is None:
        return ModelIdentity(f"sae:{source}", resolved=False)
    parts = {name: file_digest(file) for name, file in find_files(place).digested.items()}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return ModelIdentity(f"sae:{digest}")


def declared_width(source: str) -> int | None:
    """d_sae as the SAE's files declare it; None for a release that was never fetched."""
    place = _place(source)
    return read_config(find_files(place)).d_sae if place else None


def declared_input_width(source: str) -> int | None:
    """Return d_in as the SAE's files declare it; None for a release that was never fetched."""
    place = _place(source)
    return read_config(find_files(place)).d_in if place else None


def local_folder(source: str) -> Path:
    """The place of a local SAE, checked to be one that is supported: a folder, or a file.

    Raises:
        FPOError: it is none, or something that it declares is not honoured.
    """
    folder = Path(source).expanduser()
    read_config(find_files(folder))
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
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".fetching-", dir=target.parent))
    release, _, sae_id = source.partition(":")
    try:
        _fetch(release, sae_id, scratch)
        follow_umask(scratch)
        _publish(scratch, target)
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise FPOError(
            f"SAE {source!r} could not be fetched ({type(error).__name__}: {said}). Check the "
            f"release and id, and the network. Without one: {_by_hand(release, sae_id, target)}"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _publish(scratch: Path, target: Path) -> None:
    """Give a folder its name, unless another process that fetched the same was first."""
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _by_hand(release: str, sae_id: str, target: Path) -> str:
    """What to do where there is no network."""
    if "/" in release:  # a repository of the hub, which sae-lens' directory does not have
        return (
            f"get {CONFIG_FILE} and {sparsify.WEIGHTS_FILE} (in sae-lens' format {WEIGHTS_FILE}) "
            f"of the folder {sae_id} of the hub's {release} where there is network, and put them "
            f"into {target}"
        )
    return (
        f"get it where there is network with "
        f'sae_lens.SAE.from_pretrained("{release}", "{sae_id}").save_model(FOLDER), put its '
        f"{CONFIG_FILE} and {WEIGHTS_FILE} into {target}, or set sae.source to FOLDER"
    )


def _fetch(release: str, sae_id: str, folder: Path) -> None:
    """Fetch an SAE into a folder: as sparsify has it, all others in sae-lens' format."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    unknown = release not in get_pretrained_saes_directory()
    if unknown and "/" in release and _fetch_sparsify(release, sae_id, folder):
        return
    # Scaling factors that the directory has are folded into the weights here.
    sae = SAE.from_pretrained(release, sae_id, device="cpu")
    for weight in sae.parameters():  # some loaders give views, which safetensors does not save
        weight.data = weight.data.contiguous()
    sae.save_model(folder)


def _fetch_sparsify(repository: str, hookpoint: str, folder: Path) -> bool:
    """Fetch an SAE of sparsify's; False where the repository has none by that name."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        weights = hf_hub_download(repository, f"{hookpoint}/{sparsify.WEIGHTS_FILE}")
    except EntryNotFoundError:
        return False
    config = hf_hub_download(repository, f"{hookpoint}/{CONFIG_FILE}")
    shutil.copy(weights, folder / sparsify.WEIGHTS_FILE)
    shutil.copy(config, folder / CONFIG_FILE)
    return True


def _place(source: str) -> Path | None:
    """Where an SAE's files are; None for a release that was never fetched."""
    if not is_release(source):
        return local_folder(source)
    folder = _release_folder(source)
    return folder if folder.is_dir() else None


def _release_folder(source: str) -> Path:
    return cache_folder() / "saes" / source.replace("/", "__").replace(":", "--")
