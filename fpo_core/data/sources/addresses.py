"""Addresses of remote files: what is one, and what of it may be shown."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fpo_core.data.sources.row import DataFile

SCHEMES = ("https", "http", "s3")
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://.+")


class RemoteFiles(NamedTuple):
    """The files of an address, on this machine.

    Attributes:
        files: the files, in order.
        digests: sha256 of each.
        keys: their names, which identify them together with the digests.
        alone: whether the address names one file.
    """

    files: tuple[DataFile, ...]
    digests: tuple[str, ...]
    keys: tuple[str, ...]
    alone: bool


def is_remote(source: str) -> bool:
    """Return whether a source is an address rather than a path."""
    return _ADDRESS.fullmatch(source) is not None


def shown(source: str) -> str:
    """Return an address without credentials and query; anything else as it is."""
    if not is_remote(source):
        return source
    parts = urlsplit(source)
    if parts.scheme == "s3":
        return source
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def shown_deep(value: Any) -> Any:
    """Return settings with every address as `shown`: a signed URL is a credential.

    Args:
        value: plain values, as a recipe is dumped.
    """
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, Mapping):
        return {key: shown_deep(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown_deep(inner) for inner in value]
    return value
