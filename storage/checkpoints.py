"""What a stage saves of unfinished work: folders of files below its artifact.

<artifact>/checkpoints/<name>/<file>
<artifact>/checkpoints/<name>/saved.json    the files with sizes and sha256; written last

Names sort by age. They go when the artifact is committed.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from storage.backend import Backend, FileRecord, Hold
from storage.errors import FileDamaged
from storage.manifest import json_bytes

log = logging.getLogger("fpo.store")
SAVED_FILE = "saved.json"


class Saved(NamedTuple):
    """A checkpoint fetched to this machine, every file checked."""

    name: str
    folder: Path


class Checkpoints:
    """The checkpoints of one artifact in the making.

    Args:
        backend: where they are kept.
        key: the artifact's.
        hold: the exclusive right to write it.
    """

    def __init__(self, backend: Backend, key: str, hold: Hold) -> None:
        self._backend, self._hold = backend, hold
        self._key = f"{key}/checkpoints"

    def put(self, name: str, files: Iterable[Path]) -> None:
        """Save files under a name; the local ones are gone when all are saved.

        A name that is saved already is left as it is, and so are the files.

        Raises:
            StoreError: the store cannot take them; nothing then reads as whole, and all the files
                are still here.
        """
        if name in self.names():
            return
        files, records = list(files), {}
        for path in files:
            self._hold.check()
            key = f"{self._key}/{name}/{path.name}"
            records[path.name] = self._put(key, path)
        listed = {file: record._asdict() for file, record in records.items()}
        self._hold.check()
        self._backend.put(f"{self._key}/{name}/{SAVED_FILE}", json_bytes({"files": listed}))
        for path in files:
            path.unlink()

    def _put(self, key: str, path: Path) -> FileRecord:
        """Store a second name of a file, since storing takes the one that it is given."""
        other = path.with_name(f"{path.name}.going")
        other.unlink(missing_ok=True)
        other.hardlink_to(path)
        try:
            return self._backend.put_file(key, other, still_ours=self._hold.check)
        finally:
            other.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The names of whole checkpoints, oldest first."""
        keys = (entry.key.split("/") for entry in self._backend.list(f"{self._key}/"))
        return sorted(parts[-2] for parts in keys if parts[-1] == SAVED_FILE)

    def newest(self) -> Saved | None:
        """The newest one whose files are all as they were written."""
        for name in reversed(self.names()):
            try:
                return Saved(name, self._fetched(name))
            except (FileDamaged, KeyError, ValueError, TypeError) as error:
                log.warning("checkpoint %s is damaged (%s); trying the one before", name, error)
        return None

    def _fetched(self, name: str) -> Path:
        key = f"{self._key}/{name}"
        listed = json.loads(self._backend.read(f"{key}/{SAVED_FILE}"))["files"]
        records = {file: FileRecord(**record) for file, record in listed.items()}
        paths = {file: self._backend.fetch(f"{key}/{file}", r) for file, r in records.items()}
        return self._backend.folder(key, paths)

    def keep(self, count: int) -> None:
        """Remove all but the newest, and what was left of unfinished ones before them."""
        kept = self.names()[-count:]
        keys = [entry.key for entry in self._backend.list(f"{self._key}/")]
        old = [key for key in keys if kept and key.split("/")[-2] < kept[0]]
        # What says that one is whole goes first.
        self._backend.delete([key for key in old if key.endswith(f"/{SAVED_FILE}")])
        self._backend.delete([key for key in old if not key.endswith(f"/{SAVED_FILE}")])
