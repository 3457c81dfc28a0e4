"""What a store needs of the place it is kept in: a few atomic operations on keys.

Small enough for a folder and for any S3 service: ``create`` is a put with If-None-Match,
``replace`` one with If-Match. Small objects travel as bytes, data files as local files.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import pyarrow as pa

from storage.errors import StoreError

A = TypeVar("A")
B = TypeVar("B")
_BAD = re.compile(r"[\x00-\x1f\x7f\\]")
BytesDone = Callable[[int], None]


def not_shown(_bytes: int) -> None:
    """The progress callback of a caller that shows none."""


def always() -> None:
    """The check of a writer whose right cannot be lost."""


class Entry(NamedTuple):
    """A stored object."""

    key: str
    size: int
    modified: float  # seconds since 1970


class FileRecord(NamedTuple):
    """What a receipt or manifest says of a data file."""

    bytes: int
    sha256: str  # hex


def in_parallel(
    backend: "Backend", call: Callable[[A], B], items: Iterable[A], most: int = 1000
) -> list[B]:
    """Call for each item, as many at a time as suits the backend and ``most``; results in order."""
    if backend.parallel_reads == 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(backend.parallel_reads, most)) as pool:
        return list(pool.map(call, items))


class Hold(Protocol):
    """The exclusive right to write something, while its context is open."""

    def check(self) -> None:
        """Raise HoldLost when the right may be another run's by now."""
        ...


class Backend(Protocol):
    """Keys are relative paths with ``/``; every operation checks them before any I/O."""

    scratch: Path  # a local folder for work in progress
    parallel_reads: int  # small objects worth reading at a time

    @property
    def place(self) -> dict[str, str | None]:
        """What beside its URL it takes to open it again, as a recipe's ``store`` section has it."""
        ...

    def read(self, key: str) -> bytes:
        """A small object's bytes; KeyError when it is not there."""
        ...

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """The object and a tag that changes with it, or None."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Write a new object at once; False, and nothing changed, when there is another."""
        ...

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """Write if the object still has the tag (None: is not there); False otherwise."""
        ...

    def check_writable(self, key: str) -> None:
        """Write and remove a new object; StoreError when conditional writes do not work."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write an object at once, over an older one."""
        ...

    def put_file(
        self,
        key: str,
        path: Path,
        on_bytes: BytesDone = not_shown,
        still_ours: Callable[[], None] = always,
    ) -> FileRecord:
        """Move a local file into the store; what arrived is what was sent, or it raises.

        Args:
            key: where to.
            path: the file, which is gone afterwards.
            on_bytes: told of bytes as they go.
            still_ours: called before each step that could write over another run's work; raises
                when it may have become that.
        """
        ...

    def fetch(self, key: str, record: FileRecord, on_bytes: BytesDone = not_shown) -> Path:
        """A local file with the object's bytes, checked; FileDamaged with the reason."""
        ...

    def open(self, key: str, record: FileRecord) -> pa.NativeFile:
        """The object, to read parts of it: checked by its size alone; FileDamaged if it differs."""
        ...

    def is_here(self, key: str, record: FileRecord) -> bool:
        """Whether the object's bytes are on this machine, unverified: ``fetch`` brings none."""
        ...

    def copy_to(self, key: str, record: FileRecord, path: Path) -> None:
        """Write the object's bytes to a local file, checked; FileDamaged with the reason."""
        ...

    def folder(self, key: str, files: Mapping[str, Path]) -> Path:
        """A local folder with fetched files under their names below ``key``."""
        ...

    def damage(self, key: str, record: FileRecord) -> str | None:
        """Read a whole object where it is stored; why it is not what was written, or None."""
        ...

    def intact(self, records: Mapping[str, FileRecord]) -> set[str]:
        """The keys whose objects are what was written, as an interrupted run needs to know it."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """The objects whose keys start with ``prefix``, sorted."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        ...

    def hold(
        self, name: str, on_wait: Callable[[], None] | None
    ) -> AbstractContextManager[Hold | None]:
        """The only right to ``name`` among all runs on this store; a crash gives it back.

        Args:
            name: what is held, a key.
            on_wait: called once when another run has it and this one begins to wait. Where it is
                None the context is entered at once, with None.
        """
        ...

    def sweep(self, prefix: str, older_than: float) -> int:
        """Remove what killed writers left half-written below ``prefix``; returns how many.

        Args:
            prefix: of the keys.
            older_than: only what began so many seconds ago.
        """
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


def check_prefix(prefix: str) -> str:
    """Return the prefix of keys if it is one: a key, one that ends in ``/``, or nothing."""
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
