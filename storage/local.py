"""A store in a folder: write to a temporary name, sync, then link or rename into place."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.backend import Entry, check_key
from storage.errors import StoreError, StoreUnwritable

_TEMPORARY = ".tmp-"
_LOCK = ".lock"


class LocalBackend:
    """Objects as files below a root folder.

    Args:
        root: the folder; made on the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def read(self, key: str) -> bytes:
        """See Backend."""
        return self.local_path(key).read_bytes()

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """See Backend."""
        try:
            data = self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return data, hashlib.sha256(data).hexdigest()

    def create(self, key: str, data: bytes) -> bool:
        """See Backend. A hard link fails where the name exists: that is the exclusive step."""
        path = self._path(key)
        with self._temporary(path) as temporary:
            _write(temporary, data)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            _sync_folder(path.parent)
        return True

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """See Backend. Compare and swap happen under a lock file that a crash releases."""
        import fcntl

        path = self._path(key)
        with self._writing(path.parent), (path.parent / _LOCK).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read_with_etag(key)
            if (found[1] if found else None) != expected_etag:
                return False
            self.put(key, data)
        return True

    def put(self, key: str, data: bytes) -> None:
        """See Backend."""
        path = self._path(key)
        with self._temporary(path) as temporary:
            _write(temporary, data)
            temporary.replace(path)
            _sync_folder(path.parent)

    def put_file(self, key: str, path: Path) -> None:
        """See Backend. Copied, never linked: a later edit of the source stays outside."""
        target = self._path(key)
        with self._temporary(target) as temporary:
            shutil.copyfile(path, temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(target)
            _sync_folder(target.parent)

    def local_path(self, key: str) -> Path:
        """See Backend."""
        path = self._path(key)
        if not path.is_file():
            raise KeyError(key)
        return path

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Backend. Temporary files of a killed writer are not objects."""
        yield from sorted(self._found(prefix))

    def _found(self, prefix: str) -> Iterator[Entry]:
        base = self.root / prefix.rpartition("/")[0]
        for folder, _, names in os.walk(base):
            for name in names:
                if name.startswith((_TEMPORARY, _LOCK)):
                    continue
                path = Path(folder) / name
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    try:
                        stat = path.stat()
                    except FileNotFoundError:
                        continue  # deleted while we looked
                    yield Entry(key, stat.st_size, stat.st_mtime)

    def delete(self, key: str) -> None:
        """See Backend."""
        self._path(key).unlink(missing_ok=True)

    @contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        with self._writing(target.parent):
            temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
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
            raise _explained(error, self.root) from error


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


def _explained(error: OSError, root: Path) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreUnwritable(
            f"no space left for the store {str(root)!r}; free some, or choose another place with "
            f"--store or FPO_STORE. What was finished is kept"
        )
    return StoreUnwritable(
        f"the store folder {str(root)!r} cannot be written ({error.strerror}); choose another with "
        f"--store or FPO_STORE"
    )
