"""A store in a folder: write to a temporary name, sync, then link or rename into place."""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from storage.backend import (
    BytesDone,
    Entry,
    FileRecord,
    always,
    check_key,
    check_prefix,
    not_shown,
)
from storage.errors import FileDamaged, StoreError, StoreUnwritable
from storage.locks import file_lock

_TEMPORARY = ".tmp-"
_LOCK = ".lock"


class LocalBackend:
    """Objects as files below a root folder.

    Args:
        root: the folder; made on the first write.
    """

    parallel_reads = 1  # more threads would wait for each other, not for the disk

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root / "scratch"

    @property
    def place(self) -> dict[str, str | None]:
        """See Backend."""
        return {}

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def read(self, key: str) -> bytes:
        """See Backend."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise KeyError(key) from error

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """See Backend."""
        try:
            data = self.read(key)
        except KeyError:
            return None
        return data, hashlib.sha256(data).hexdigest()

    def create(self, key: str, data: bytes) -> bool:
        """See Backend. A hard link fails where the name exists: that is the exclusive step."""
        path = self._path(key)
        with self._temporary(path, uuid.uuid4().hex) as temporary:
            _write(temporary, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            temporary.unlink()  # before the slow part: a writer killed in it leaves nothing over
            _sync_folder(path.parent)
        return True

    def check_writable(self, key: str) -> None:
        """See Backend."""
        self.create(key, b"1")
        self.delete([key])

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """See Backend. Compare and swap happen under a lock file that a crash releases.

        The lock makes one temporary name enough, so what a killed writer left of it goes with
        the next write.
        """
        path = self._path(key)
        with self._writing(path.parent), (path.parent / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read_with_etag(key)
            if (found[1] if found else None) != expected_etag:
                return False
            self._put(path, data, "swap")
        return True

    def put(self, key: str, data: bytes) -> None:
        """See Backend."""
        self._put(self._path(key), data, uuid.uuid4().hex)

    def _put(self, path: Path, data: bytes, name: str) -> None:
        with self._temporary(path, name) as temporary:
            _write(temporary, data)
            temporary.replace(path)
            _sync_folder(path.parent)

    def put_file(
        self,
        key: str,
        path: Path,
        on_bytes: BytesDone = not_shown,
        still_ours: Callable[[], None] = always,
    ) -> FileRecord:
        """See Backend. Renamed into place, or copied from another file system."""
        target = self._path(key)
        with self._temporary(target, uuid.uuid4().hex) as temporary:
            # A new file has the mode that the umask asks for; safetensors' own are private.
            temporary.touch()
            mode = temporary.stat().st_mode
            shutil.move(path, temporary)
            temporary.chmod(mode)
            with temporary.open("rb") as stream:
                record = FileRecord(
                    os.fstat(stream.fileno()).st_size,
                    hashlib.file_digest(stream, "sha256").hexdigest(),
                )
                os.fsync(stream.fileno())
            still_ours()
            temporary.replace(target)
            _sync_folder(target.parent)
        on_bytes(record.bytes)
        return record

    def fetch(self, key: str, record: FileRecord, on_bytes: BytesDone = not_shown) -> Path:
        """See Backend. The stored file itself."""
        reason = self.damage(key, record)
        if reason:
            raise FileDamaged(reason)
        on_bytes(record.bytes)
        return self._path(key)

    def open(self, key: str, record: FileRecord) -> pa.NativeFile:
        """See Backend."""
        try:
            stream = pa.OSFile(str(self._path(key)))  # of Python's, Arrow's threads may outlive it
        except FileNotFoundError:
            raise FileDamaged("it is missing") from None
        size = stream.size()
        if size != record.bytes:
            stream.close()
            raise FileDamaged(f"it has {size} bytes, written were {record.bytes}")
        return stream

    def is_here(self, key: str, record: FileRecord) -> bool:
        """See Backend."""
        path = self._path(key)
        return path.is_file() and path.stat().st_size == record.bytes

    def copy_to(self, key: str, record: FileRecord, path: Path) -> None:
        """See Backend."""
        shutil.copyfile(self.fetch(key, record), path)

    def folder(self, key: str, files: Mapping[str, Path]) -> Path:
        """See Backend. Where the files are."""
        folder = self._path(key)
        assert all(path == folder / name for name, path in files.items())
        return folder

    def damage(self, key: str, record: FileRecord) -> str | None:
        """See Backend."""
        return file_damage(self._path(key), record)

    def intact(self, records: Mapping[str, FileRecord]) -> set[str]:
        """See Backend. A disk may have lost what a receipt says, so every byte is read."""
        return {key for key, record in records.items() if self.damage(key, record) is None}

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Backend. Temporary files of a killed writer are not objects."""
        check_prefix(prefix)
        found = _files(self.root, prefix.rpartition("/")[0])
        yield from sorted(
            entry for entry in found
            if entry.key.startswith(prefix) and not _is_ours(entry.key.rpartition("/")[2])
        )  # fmt: skip

    def delete(self, keys: Iterable[str]) -> None:
        """See Backend. Folders that it empties go too."""
        paths = [self._path(key) for key in keys]
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in sorted({path.parent for path in paths}, reverse=True):
            self._remove_empty(folder)

    def _remove_empty(self, folder: Path) -> None:
        while folder != self.root:
            try:
                folder.rmdir()
            except OSError:
                return  # not empty, or gone: either way nothing to do
            folder = folder.parent

    @contextmanager
    def hold(self, name: str, on_wait: Callable[[], None] | None) -> Iterator["_Locked | None"]:
        """See Backend."""
        path = self.root / "locks" / check_key(name).replace("/", "-")
        with self._writing(path.parent):
            pass  # makes the folder, or says in words why it cannot
        with file_lock(path, on_wait) as held:
            yield _Locked() if held else None

    def sweep(self, prefix: str, older_than: float) -> int:
        """See Backend. Temporary files."""
        check_prefix(prefix)
        before, removed = time.time() - older_than, 0
        for entry in list(_files(self.root, prefix.rpartition("/")[0])):
            name = entry.key.rpartition("/")[2]
            if name.startswith(_TEMPORARY) and entry.modified <= before:
                (self.root / entry.key).unlink(missing_ok=True)
                removed += 1
        return removed

    @contextmanager
    def _temporary(self, target: Path, name: str) -> Iterator[Path]:
        with self._writing(target.parent):
            temporary = target.parent / f"{_TEMPORARY}{name}"
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, folder: Path) -> Iterator[None]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise explained(error, f"the store {str(self.root)!r}") from error


class _Locked:
    def check(self) -> None:
        """The kernel keeps a file lock for as long as we live."""


def file_damage(path: Path, record: FileRecord) -> str | None:
    """Why a file is not what was written, or None when it is."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"it has {size} bytes, written were {record.bytes}"
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return "it is missing"
    if digest != record.sha256:
        return f"its sha256 is {digest[:12]}..., written was {record.sha256[:12]}..."
    return None


def explained(error: OSError, place: str, setting: str = "--store or FPO_STORE") -> StoreError:
    """An operating system's refusal to write, in words.

    Args:
        error: what it said.
        place: what was written to, such as ``the store '/data/fpo'``.
        setting: what to set to write elsewhere.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreUnwritable(
            f"no space left for {place}; free some, or choose another place with {setting}. "
            f"What was finished is kept"
        )
    return StoreUnwritable(
        f"{place} cannot be written ({error.strerror}); choose another with {setting}"
    )


def _files(root: Path, folder: str) -> Iterator[Entry]:
    """All files below a folder, temporary ones included. Plain strings: a store has many."""
    try:
        found = list(os.scandir(root / folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in found:
        key = f"{folder}/{item.name}" if folder else item.name
        if item.is_dir(follow_symlinks=False):
            yield from _files(root, key)
            continue
        try:
            stat = item.stat()
        except FileNotFoundError:
            continue  # deleted while we looked
        yield Entry(key, stat.st_size, stat.st_mtime)


def _is_ours(name: str) -> bool:
    return name.startswith((_TEMPORARY, _LOCK))


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
