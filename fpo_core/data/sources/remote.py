"""Files at s3:// and https:// addresses: fetched once, stored by content, reused while unchanged.

The cache folder has each file under its sha256, and a record for each address: what the server
said about the file, and the sha256 it had. The address itself, which may be signed, is not stored.
"""

import datetime as dt
import functools
import hashlib
import json
import logging
import re
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from aiohttp import ClientError
from fsspec.callbacks import Callback

from fpo_core.data.sources.addresses import SCHEMES, RemoteFiles, shown
from fpo_core.data.sources.filesystems import Problem, State, filesystem, problem_of, state_of
from fpo_core.data.sources.row import DataFile
from fpo_core.data.sources.slices import is_glob
from fpo_core.data.sources.splits import METADATA
from fpo_core.errors import FPOError
from fpo_core.models.source import cache_folder, file_digest
from fpo_core.progress import Progress

log = logging.getLogger("fpo.data")

SHOWN_FROM = 16 << 20  # bytes; a smaller download shows no progress
_UNIT = 1_000_000  # bytes
# A file changed this shortly before it was fetched may change again with the same time.
_SURE_AFTER = dt.timedelta(seconds=2)
# What fsspec, aiohttp (whose errors are ValueErrors, OSErrors or Exceptions) and pyarrow raise.
_FAILURES = (OSError, ClientError, ValueError)


class _Copy(NamedTuple):
    """What the cache has of an address."""

    state: State
    sha256: str
    sure: bool  # whether an equal state means equal content

    @property
    def path(self) -> Path:
        return _folder() / self.sha256

    @property
    def is_whole(self) -> bool:
        return self.path.is_file() and file_digest(self.path) == self.sha256


def fetch(source: str) -> RemoteFiles:
    """Fetch the files of an address into the cache, those that changed since the last time.

    Where the server cannot be reached, the last copy is used, with a warning.

    Args:
        source: the address, or a pattern of s3:// addresses.

    Raises:
        FPOError: a file does not exist, may not be read, or cannot be fetched.
    """
    scheme, bucket = urlsplit(source)[:2]
    if scheme not in SCHEMES:
        raise FPOError(
            f"data {shown(source)!r}: addresses of {scheme}:// cannot be read; use https:// or "
            f"s3://, or download the file"
        )
    connect = functools.cache(lambda: filesystem(scheme, bucket))
    if scheme == "s3" and is_glob(source):
        addresses = _matches(connect, source)
        start = re.split(r"[*?\[]", source, maxsplit=1)[0].rpartition("/")[0]
        keys = [address.removeprefix(f"{start}/") for address in addresses]
    else:
        addresses, keys = [source], [PurePosixPath(urlsplit(source).path).name]
    copies = [_fetch_one(connect, address) for address in addresses]
    files = (
        DataFile(copy.path, shown(address), PurePosixPath(key).name)
        for copy, address, key in zip(copies, addresses, keys, strict=True)
    )
    alone = addresses == [source]
    return RemoteFiles(tuple(files), tuple(copy.sha256 for copy in copies), tuple(keys), alone)


def _matches(connect: Callable[[], Any], source: str) -> list[str]:
    """Return the addresses of the data files that a pattern matches, sorted."""
    found, problem = [], None
    try:
        found = connect().glob(source.removeprefix("s3://"))
    except _FAILURES as error:
        problem = problem_of(error)
    if problem:
        raise _error(source, problem)
    names = sorted(name for name in found if _may_hold_data(PurePosixPath(name).name))
    if not names:
        raise FPOError(f"data {source!r} matches no file; check bucket and pattern")
    return [f"s3://{name}" for name in names]


def _may_hold_data(name: str) -> bool:
    return name not in METADATA and not name.startswith((".", "_")) and not name.endswith(".md")


def _fetch_one(connect: Callable[[], Any], address: str) -> _Copy:
    """Return the copy of a file, fetched where it is not the one that the server has now."""
    known, copy, problem = _read_record(address), None, None
    path = address.removeprefix("s3://")
    try:
        state = state_of(connect(), path)
        if known and known.sure and known.state == state and known.is_whole:
            return known
        copy = _download(connect(), path, state, shown(address))
        _write_record(address, copy)
    except _FAILURES as error:
        problem = problem_of(error)
    if copy and not problem:
        return copy
    assert problem is not None
    if problem.offline and known and known.is_whole:
        log.warning("data %s: %s. The last copy is used", shown(address), problem.text)
        return known
    # Outside of the handler: the library's error, which names the whole address, is no context.
    raise _error(address, problem)


def _error(address: str, problem: Problem) -> FPOError:
    return FPOError(f"data {shown(address)!r}: {problem.text}")


def _download(store: Any, path: str, state: State, name: str) -> _Copy:
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{uuid.uuid4().hex}"
    try:
        log.info("data %s: fetching it", name)
        with _Shown(name) as shows:
            store.get_file(path, str(partial), callback=shows)
        with partial.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        partial.replace(folder / sha256)
    finally:
        partial.unlink(missing_ok=True)
    return _Copy(state, sha256, _is_sure(state))


class _Shown(Callback):
    """Shows how far a big download is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._progress: Progress | None = None
        self._shown = 0

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        """Follow the number of bytes; fsspec calls this whenever it or the total changes."""
        super().call(hook_name, **kwargs)
        if self._progress is None and self.size and self.size >= SHOWN_FROM:
            label, total = f"fetching {self._name}", self.size // _UNIT
            self._progress = Progress(label, total=total, unit="MB").__enter__()
        if self._progress is not None and (new := self.value // _UNIT - self._shown):
            self._shown += new
            self._progress.advance(new)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


def _is_sure(state: State) -> bool:
    if state.etag:
        return True
    if state.mtime is None:
        return False
    try:
        changed = dt.datetime.fromisoformat(state.mtime)
    except ValueError:
        try:
            changed = parsedate_to_datetime(state.mtime)
        except ValueError:
            return False
    if changed.tzinfo is None:
        changed = changed.replace(tzinfo=dt.UTC)
    return dt.datetime.now(dt.UTC) - changed > _SURE_AFTER


def _folder() -> Path:
    return cache_folder() / "data"


def _record(address: str) -> Path:
    return _folder() / "addresses" / f"{hashlib.sha256(address.encode()).hexdigest()}.json"


def _read_record(address: str) -> _Copy | None:
    try:
        value = json.loads(_record(address).read_text(encoding="utf-8"))
        return _Copy(State(*value["state"]), value["sha256"], value["sure"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none yet, or one that was cut off: the file is fetched again


def _write_record(address: str, copy: _Copy) -> None:
    record = _record(address)
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_name(f".{uuid.uuid4().hex}")
    partial.write_text(json.dumps({"state": copy.state, "sha256": copy.sha256, "sure": copy.sure}))
    partial.replace(record)
