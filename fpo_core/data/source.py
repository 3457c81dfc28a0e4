"""Where preference data comes from, and what identifies it."""

import os
import re
from pathlib import Path

from fpo_core.errors import FPOError
from fpo_core.models.source import ModelIdentity, file_digest

_HUB = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+):(?P<split>[\w.]+)$")


def hub_dataset(source: str) -> tuple[str, str] | None:
    """``owner/name:split`` as (name, split); None when the source is a path."""
    match = _HUB.match(source)
    return (match["name"], match["split"]) if match and not Path(source).exists() else None


def identify_data(source: str) -> ModelIdentity:
    """Content identity of a data source: the file's digest, or the hub's commit.

    Raises:
        FPOError: the file does not exist.
    """
    hub = hub_dataset(source)
    if hub is None:
        path = Path(source).expanduser()
        if not path.is_file():
            raise FPOError(
                f"data file {source!r} does not exist; a relative path starts at the folder the "
                f"command runs in"
            )
        return ModelIdentity(f"file:{file_digest(path)}")
    name = f"hub-data:{source}"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return ModelIdentity(name, resolved=False)
    from huggingface_hub import dataset_info

    try:
        return ModelIdentity(f"{name}@{dataset_info(hub[0], timeout=5).sha}")
    except Exception:  # noqa: BLE001 - any failure to ask means the same: not resolved
        return ModelIdentity(name, resolved=False)
