"""Local copies of an S3 store's files, by content, within a size limit, shared by processes.

    <folder>/files/<2 digits>/<sha256>  verified files; the least recently used ones are dropped
    <folder>/pins/<id>                  what a process uses; the kernel unlocks it when it ends
    <folder>/incoming/<id>-<n>          downloads under way
    <folder>/views/<id>/...             folders of symbolic links, such as a model's

A file that a living process has a path to is never dropped; a limit that is smaller than
what is in use at once is exceeded until it is not any more.
"""

import fcntl
import itertools
import os
import re
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pyarrow as pa

from storage.backend import FileRecord
from storage.errors import StoreError
from storage.local import explained, file_damage
from storage.locks import file_lock

DEFAULT_LIMIT = "50GB"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def cache_folder() -> Path:
    """``FPO_CACHE``, or ``~/.cache/fpo``."""
    return Path(os.environ.get("FPO_CACHE") or Path.home() / ".cache" / "fpo").expanduser()


def cache_limit() -> int:
    """Bytes, from ``FPO_CACHE_SIZE`` such as ``200GB``; 50 GB where it is not set.

    Raises:
        StoreError: it is not a size.
    """
    text = os.environ.get("FPO_CACHE_SIZE") or DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)?", text.strip().upper())
    if not match:
        raise StoreError(f"FPO_CACHE_SIZE={text!r} is not a size; write it as 200GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


class ReadCache:
    """One process's view of the cache.

    Args:
        folder: of the cache; made when first used.
        limit: bytes to keep.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.root, self.limit = folder, limit
        self._id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._counter = itertools.count()
        self._one_thread = threading.Lock()
        self._pins: IO[bytes] | None = None
        self._checked: set[str] = set()

    def get(self, record: FileRecord, download: Callable[[Path], None]) -> Path:
        """A verified local file of that content.

        Args:
            record: the content.
            download: writes a file, verified, to the path it is given; called when needed.

        Returns:
            A path that stays valid for the life of this object.
        """
        path = self._object(record.sha256)
        if record.sha256 in self._checked and path.is_file():
            return path
        with self._in_words():
            self._pin(record.sha256)
            # Who else wants it waits, and finds it there.
            with file_lock(self.root / "locks" / record.sha256, lambda: None):
                if file_damage(path, record) is not None:
                    path.unlink(missing_ok=True)
                    self._bring(path, record, download)
                os.utime(path)
                self._checked.add(record.sha256)
        return path

    def opened(self, record: FileRecord) -> pa.NativeFile | None:
        """The file of that content, if it is here; unverified, and readable once it is dropped."""
        try:
            stream = pa.OSFile(str(self._object(record.sha256)))
        except OSError:
            return None
        if stream.size() != record.bytes:
            stream.close()
            return None
        return stream

    def view(self, name: str, files: Mapping[str, Path]) -> Path:
        """A folder with links to cached files under other names, for the life of this object."""
        folder = self.root / "views" / self._id / name
        with self._in_words():
            for inner, target in files.items():
                link = folder / inner
                link.parent.mkdir(parents=True, exist_ok=True)
                link.unlink(missing_ok=True)
                link.symlink_to(target.resolve())
        return folder

    def _object(self, sha256: str) -> Path:
        return self.root / "files" / sha256[:2] / sha256

    def _bring(self, path: Path, record: FileRecord, download: Callable[[Path], None]) -> None:
        self._evict(making_room_for=record.bytes)
        incoming = self.root / "incoming" / f"{self._id}-{next(self._counter)}"
        incoming.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(incoming)
            path.parent.mkdir(parents=True, exist_ok=True)
            incoming.replace(path)
        finally:
            incoming.unlink(missing_ok=True)

    def _pin(self, sha256: str) -> None:
        """Note a file as in use. Not while somebody chooses what to drop: he reads the notes."""
        with self._choosing(fcntl.LOCK_SH), self._one_thread:
            if self._pins is None:
                path = self.root / "pins" / self._id
                path.parent.mkdir(parents=True, exist_ok=True)
                self._pins = path.open("ab", buffering=0)
                fcntl.flock(self._pins, fcntl.LOCK_EX)
                view = self.root / "views" / self._id
                weakref.finalize(self, _tidy, self._pins, path, view)
            self._pins.write(f"{sha256}\n".encode())

    def _evict(self, *, making_room_for: int) -> None:
        with self._choosing(fcntl.LOCK_EX):
            pinned = self._pinned()
            found = _by_age(self.root.glob("files/??/*"))
            total = sum(size for _, size, _ in found) + making_room_for
            for _, size, path in found:
                if total <= self.limit:
                    break
                if path.name not in pinned:
                    path.unlink(missing_ok=True)
                    total -= size

    def _pinned(self) -> set[str]:
        """What living processes use; what dead ones left is removed."""
        living = {self._id}
        pinned: set[str] = set()
        for path in self.root.glob("pins/*"):
            with suppress(FileNotFoundError), path.open("rb") as stream:  # its process may just end
                if path.name != self._id and _is_free(stream.fileno()):
                    path.unlink()
                    continue
                living.add(path.name)
                pinned.update(stream.read().decode().split())
        for path in self.root.glob("incoming/*"):
            if path.name.rpartition("-")[0] not in living:
                path.unlink(missing_ok=True)
        for path in self.root.glob("views/*"):
            if path.name not in living:
                shutil.rmtree(path, ignore_errors=True)
        return pinned

    @contextmanager
    def _choosing(self, kind: int) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "choosing.lock").open("a") as lock:
            fcntl.flock(lock, kind)
            yield

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explained(error, f"the read cache {str(self.root)!r}", "FPO_CACHE") from error


def _by_age(paths: Iterable[Path]) -> list[tuple[float, int, Path]]:
    """Time of last use, size and path of files, the oldest first."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # damaged, and just removed by who found it so
            stat = path.stat()
            found.append((stat.st_mtime, stat.st_size, path))
    return sorted(found)


def _tidy(pins: IO[bytes], path: Path, view: Path) -> None:
    path.unlink(missing_ok=True)
    pins.close()
    shutil.rmtree(view, ignore_errors=True)


def _is_free(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
