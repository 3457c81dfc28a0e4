"""What a store needs of the place it is kept in: a few atomic operations on keys.

Small enough for a folder and for any S3 service: ``create`` is a put with If-None-Match,
``replace`` one with If-Match.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from storage.errors import StoreError

_BAD = re.compile(r"[\x00-\x1f\x7f\\]")


class Entry(NamedTuple):
    """A stored object."""

    key: str
    size: int
    modified: float  # seconds since 1970


class Backend(Protocol):
    """Keys are relative paths with ``/``; every operation checks them before any I/O."""

    def read(self, key: str) -> bytes:
        """The object's bytes; KeyError when it is not there."""
        ...

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """The object and a tag that changes with it, or None."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object at once; False, and nothing changed, when it exists."""
        ...

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """Write if the object still has the tag (None: is not there); False otherwise."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write an object at once, over an older one of the same content."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """The same from a file."""
        ...

    def local_path(self, key: str) -> Path:
        """A local file with the object's bytes; KeyError when it is not there."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose keys start with ``prefix``, sorted."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; nothing happens when it is not there."""
        ...


def check_key(key: str) -> str:
    """Return the key if it is one.

    Raises:
        StoreError: absolute, with ``..``, a backslash, a control character or an empty part.
    """
    parts = key.split("/")
    if _BAD.search(key) or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{key!r} is not a name in a store")
    return key
