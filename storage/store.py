"""A store of artifacts: find them, write them, and remember who refers to which.

<root>/artifacts/<stage>/<version>/manifest.json    written last: the commit point
<root>/artifacts/<stage>/<version>/data/...         shards and files
<root>/artifacts/<stage>/<version>/parts/00000.json receipts of finished shards
<root>/artifacts/<stage>/<version>/checkpoints/...  saved work of one that is not finished
<root>/refs/<recipe>/<stage>.json                   the version a recipe last made or used
<root>/runs/<run id>.json                           one pipeline run: recipe and artifacts
<root>/runs/<run id>/...                            files kept with it
<root>/dates/<data>.json                            the day data was first tokenized here
"""

import json
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from storage.artifact import Artifact, artifact_key
from storage.backend import Backend, FileRecord, Hold, check_key
from storage.checkpoints import SAVED_FILE
from storage.errors import ArtifactMissing, RefConflict, StoreError
from storage.manifest import MANIFEST, json_bytes, read_manifest
from storage.writer import ArtifactWriter, Receipt

State = Literal["missing", "partial", "complete"]
PARTS = ("parts", "checkpoints")  # of an artifact in the making: work that a later run keeps
_SWAP_ATTEMPTS = 20


class Ref(NamedTuple):
    """A recipe's pointer to the artifact of a stage."""

    recipe: str
    stage: str  # of the artifact
    version: str | None  # None where the ref cannot be read


class Begun(NamedTuple):
    """How far an unfinished artifact is."""

    shards: int  # finished ones
    checkpoint: str | None  # the newest


class Store:
    """Artifacts by content.

    Args:
        url: what it was opened with.
        backend: where it is kept.
    """

    def __init__(self, url: str, backend: Backend) -> None:
        self.url, self.backend = url, backend

    def check_writable(self) -> None:
        """Write and remove a mark, so that a run fails before its first hour and not after it.

        Raises:
            StoreError: naming the store and what to do.
        """
        self.backend.check_writable(f"writable-{uuid.uuid4().hex}.tmp")

    def state(self, stage: str, version: str) -> State:
        """Whether an artifact is there."""
        key = artifact_key(stage, version)
        if next(self.backend.list(f"{key}/{MANIFEST}"), None):
            return "complete"
        begun = (next(self.backend.list(f"{key}/{part}/"), None) for part in PARTS)
        return "partial" if any(begun) else "missing"

    def artifact(self, stage: str, version: str) -> Artifact:
        """A finished artifact.

        Raises:
            ArtifactMissing: it is not there, or not finished.
            ArtifactCorrupt: its manifest cannot be read, or was changed.
        """
        try:
            data = self.backend.read(f"{artifact_key(stage, version)}/{MANIFEST}")
        except KeyError as error:
            raise ArtifactMissing(
                f"{stage}/{version} is not in the store {self.url!r}, or not finished"
            ) from error
        return Artifact(self.backend, stage, version, read_manifest(data, stage, version))

    @contextmanager
    def hold(
        self, stage: str, version: str, on_wait: Callable[[], None] | None
    ) -> Iterator[Hold | None]:
        """The exclusive right to write an artifact; see ``Backend.hold``."""
        with self.backend.hold(f"{stage}/{version}", on_wait) as hold:
            yield hold

    def writer(self, stage: str, version: str, hold: Hold) -> ArtifactWriter:
        """A writer that goes on where an earlier attempt stopped."""
        self.backend.sweep(f"{artifact_key(stage, version)}/", 0)
        return ArtifactWriter(self.backend, stage, version, hold)

    def discard(self, stage: str, version: str) -> None:
        """Remove an artifact, manifest first, so that it never reads as whole."""
        key = artifact_key(stage, version)
        self.backend.delete([f"{key}/{MANIFEST}"])
        self.backend.delete([entry.key for entry in self.backend.list(f"{key}/")])
        shutil.rmtree(self.backend.scratch / f"{stage}-{version}", ignore_errors=True)

    def unfinish(self, stage: str, version: str, bad_files: Iterable[str]) -> None:
        """Make an artifact partial again, without some of its files; the other shards stay.

        Args:
            stage: the artifact's name.
            version: its version.
            bad_files: names below ``data/``; their shards are to be computed again.
        """
        key, bad = artifact_key(stage, version), set(bad_files)
        self.backend.delete([f"{key}/{MANIFEST}"])
        for name, receipt in self._receipts(stage, version).items():
            if receipt is None or bad & set(receipt.files):
                self.backend.delete([name])
        self.backend.delete([f"{key}/data/{file}" for file in bad])

    def begun(self, stage: str, version: str) -> Begun:
        """How far an artifact is that was begun and not finished, by what is listed of it."""
        key = artifact_key(stage, version)
        shards = sum(1 for _ in self.backend.list(f"{key}/parts/"))
        names = {
            entry.key.removeprefix(f"{key}/checkpoints/").partition("/")[0]
            for entry in self.backend.list(f"{key}/checkpoints/")
            if entry.key.endswith(f"/{SAVED_FILE}")
        }
        return Begun(shards, max(names, default=None))

    def received_files(self, stage: str, version: str) -> dict[str, FileRecord]:
        """The data files that an artifact's receipts name, by name below ``data/``."""
        receipts = self._receipts(stage, version).values()
        return {n: record for r in receipts if r for n, record in r.files.items()}

    def _receipts(self, stage: str, version: str) -> dict[str, Receipt | None]:
        keys = [e.key for e in self.backend.list(f"{artifact_key(stage, version)}/parts/")]
        return {key: Receipt.from_json(self.backend.read(key)) for key in keys}

    def set_ref(self, recipe: str, stage: str, version: str) -> None:
        """Point a recipe's ref at a version (compare and swap).

        Raises:
            RefConflict: others kept moving it.
        """
        key = f"refs/{recipe}/{stage}.json"
        data = json.dumps({"version": version}).encode()
        for _ in range(_SWAP_ATTEMPTS):
            found = self.backend.read_with_etag(key)
            if found and found[0] == data:
                return
            if self.backend.replace(key, data, found[1] if found else None):
                return
        raise RefConflict(f"the ref {key} keeps moving; is another run writing it in a loop?")

    def ref(self, recipe: str, stage: str) -> str | None:
        """The version a recipe's ref points at."""
        found = self.backend.read_with_etag(f"refs/{recipe}/{stage}.json")
        return _version(found[0]) if found else None

    def refs(self) -> list[Ref]:
        """All refs."""
        found = []
        for entry in self.backend.list("refs/"):
            _, recipe, *inner = entry.key.split("/")
            if len(inner) != 1 or not inner[0].endswith(".json"):
                continue  # a stray file
            try:
                version = _version(self.backend.read(entry.key))
            except KeyError as error:
                raise StoreError(f"the ref {entry.key} went away while it was read") from error
            found.append(Ref(recipe, inner[0].removesuffix(".json"), version))
        return found

    def first_date(self, data: str) -> str | None:
        """Return the day that data was first tokenized into this store, None when it was not.

        Args:
            data: content identity of the data.
        """
        found = self.backend.read_with_etag(f"dates/{check_key(data)}.json")
        return None if found is None else str(json.loads(found[0])["date"])

    def dates(self) -> dict[str, str]:
        """Return the day of every data set on record, by its identity."""
        keys = [entry.key for entry in self.backend.list("dates/")]
        names = [key.removeprefix("dates/").removesuffix(".json") for key in keys]
        found = {name: self.first_date(name) for name in names}
        return {name: date for name, date in found.items() if date is not None}

    def record_date(self, data: str, date: str) -> str:
        """Record the day that data is first tokenized; of several runs the first one's stays.

        Returns:
            The day on record.
        """
        self.backend.create(f"dates/{check_key(data)}.json", json_bytes({"date": date}))
        recorded = self.first_date(data)
        assert recorded is not None
        return recorded

    def put_run(self, run_id: str, record: dict[str, Any]) -> None:
        """Record a pipeline run, or what became of it."""
        self.backend.put(f"runs/{check_key(run_id)}.json", json_bytes(record))

    def put_run_file(self, run_id: str, path: Path) -> str:
        """Keep a file with a run's record, which goes when that goes; returns its key."""
        key = check_key(f"runs/{run_id}/{path.name}")
        self.backend.put_file(key, path)
        return key

    def read_run_file(self, run_id: str, name: str) -> bytes:
        """Read a file that is kept with a run's record.

        Raises:
            KeyError: the run or the file does not exist.
            StoreError: ``run_id`` or ``name`` cannot be a name in a store.
        """
        return self.backend.read(check_key(f"runs/{run_id}/{name}"))

    def remove_runs(self, run_ids: Collection[str]) -> None:
        """Remove runs' records, and the files kept with them."""
        files = [e.key for run_id in run_ids for e in self.backend.list(f"runs/{run_id}/")]
        self.backend.delete([*files, *(f"runs/{run_id}.json" for run_id in run_ids)])

    def runs(self, but: Collection[str] = ()) -> dict[str, dict[str, Any] | None]:
        """The recorded runs by id, ``but`` these; None for one that cannot be read."""
        found: dict[str, dict[str, Any] | None] = {}
        for entry in self.backend.list("runs/"):
            run_id = entry.key.removeprefix("runs/").removesuffix(".json")
            if run_id in but or "/" in run_id or not entry.key.endswith(".json"):
                continue
            try:
                value = json.loads(self.backend.read(entry.key))
            except KeyError:
                continue  # removed while we looked
            except ValueError:
                value = None
            found[run_id] = value if isinstance(value, dict) else None
        return found


def _version(data: bytes) -> str | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    version = value.get("version") if isinstance(value, dict) else None
    return version if isinstance(version, str) else None
