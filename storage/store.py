"""A store of artifacts: find them, write them, and remember who refers to which.

<root>/artifacts/<stage>/<version>/manifest.json    written last: the commit point
<root>/artifacts/<stage>/<version>/data/...         shards and files
<root>/artifacts/<stage>/<version>/parts/00000.json receipts of finished shards
<root>/refs/<recipe>/<stage>.json                   the version a recipe last made or used
<root>/scratch/<stage>-<version>/                   work in progress of a local run
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from storage.artifact import MANIFEST, Artifact, ArtifactWriter, artifact_key
from storage.backend import Backend
from storage.errors import (
    ArtifactCorrupt,
    ArtifactMissing,
    RefConflict,
    StoreError,
)
from storage.local import LocalBackend

__all__ = ["Artifact", "ArtifactInfo", "ArtifactWriter", "Store", "open_store"]

State = Literal["missing", "partial", "complete"]
_SWAP_ATTEMPTS = 20


class ArtifactInfo(NamedTuple):
    """One line of a store's listing."""

    stage: str
    version: str
    state: State
    rows: int | None
    bytes: int
    created: str | None
    refs: tuple[str, ...]  # recipes


def open_store(url: str | Path) -> "Store":
    """Open the store at a path or a ``file:///`` URL.

    Raises:
        StoreError: another kind of URL.
    """
    text = str(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        raise StoreError(
            f"store {text!r}: only folders are supported so far (a path or file:///...); "
            f"set --store or FPO_STORE to one"
        )
    return Store(text, LocalBackend(Path(text).expanduser()), Path(text).expanduser() / "scratch")


class Store:
    """Artifacts by content.

    Args:
        url: what it was opened with.
        backend: where it is kept.
        scratch: a local folder for work in progress.
    """

    def __init__(self, url: str, backend: Backend, scratch: Path) -> None:
        self.url, self._backend, self._scratch = url, backend, scratch

    def check_writable(self) -> None:
        """Write and remove a mark, so that a run fails before its first hour and not after it.

        Raises:
            StoreUnwritable: naming the store.
        """
        self._backend.put("writable.tmp", b"")
        self._backend.delete("writable.tmp")

    def state(self, stage: str, version: str) -> State:
        """Whether an artifact is there."""
        key = artifact_key(stage, version)
        found = next(iter(self._backend.list(f"{key}/{MANIFEST}")), None)
        if found:
            return "complete"
        return "partial" if next(iter(self._backend.list(f"{key}/parts/")), None) else "missing"

    def artifact(self, stage: str, version: str) -> Artifact:
        """A finished artifact.

        Raises:
            ArtifactMissing: it is not there, or not finished.
            ArtifactCorrupt: its manifest cannot be read.
        """
        key = f"{artifact_key(stage, version)}/{MANIFEST}"
        try:
            manifest = json.loads(self._backend.read(key))
        except KeyError as error:
            raise ArtifactMissing(
                f"{stage}/{version} is not in the store {self.url!r}, or not finished"
            ) from error
        except json.JSONDecodeError as error:
            raise ArtifactCorrupt(
                f"{stage}/{version} is damaged: its manifest is not JSON ({error})", stage
            ) from error
        if (manifest.get("stage"), manifest.get("version")) != (stage, version):
            raise ArtifactCorrupt(
                f"{stage}/{version} is damaged: its manifest is that of another artifact", stage
            )
        return Artifact(self._backend, stage, version, manifest)

    def writer(self, stage: str, version: str) -> ArtifactWriter:
        """A writer that goes on where an earlier attempt stopped."""
        return ArtifactWriter(self._backend, stage, version, self._scratch / f"{stage}-{version}")

    def discard(self, stage: str, version: str) -> None:
        """Remove an artifact, manifest first, so that it never reads as whole."""
        key = artifact_key(stage, version)
        self._backend.delete(f"{key}/{MANIFEST}")
        for kind in ("parts", "data"):
            for entry in list(self._backend.list(f"{key}/{kind}/")):
                self._backend.delete(entry.key)
        shutil.rmtree(self._scratch / f"{stage}-{version}", ignore_errors=True)

    def artifacts(self) -> list[ArtifactInfo]:
        """All artifacts, finished or not."""
        sizes: dict[tuple[str, str], int] = {}
        for entry in self._backend.list("artifacts/"):
            _, stage, version, *_ = entry.key.split("/")
            sizes[stage, version] = sizes.get((stage, version), 0) + entry.size
        refs: dict[tuple[str, str], list[str]] = {}
        for recipe, stage, version in self.refs():
            refs.setdefault((stage, version), []).append(recipe)
        return [
            self._info(stage, version, size, tuple(sorted(refs.get((stage, version), ()))))
            for (stage, version), size in sizes.items()
        ]

    def _info(self, stage: str, version: str, size: int, refs: tuple[str, ...]) -> ArtifactInfo:
        state = self.state(stage, version)
        if state != "complete":
            return ArtifactInfo(stage, version, "partial", None, size, None, refs)
        manifest = self.artifact(stage, version).manifest
        return ArtifactInfo(
            stage, version, state, manifest["rows"], manifest["bytes"], manifest["created"], refs
        )

    def find(self, name: str) -> ArtifactInfo:
        """The artifact named ``stage/version``, or by the start of either.

        Raises:
            ArtifactMissing: none matches.
            StoreError: several do.
        """
        matches = [
            info
            for info in self.artifacts()
            if f"{info.stage}/{info.version}".startswith(name) or info.version.startswith(name)
        ]
        if not matches:
            raise ArtifactMissing(
                f"no artifact {name!r} in the store {self.url!r}; see `fpo store ls`"
            )
        if len(matches) > 1:
            every = ", ".join(f"{info.stage}/{info.version}" for info in matches)
            raise StoreError(f"{name!r} is ambiguous: {every}")
        return matches[0]

    def set_ref(self, recipe: str, stage: str, version: str) -> None:
        """Point a recipe's ref at a version (compare and swap).

        Raises:
            RefConflict: others kept moving it.
        """
        key = f"refs/{recipe}/{stage}.json"
        data = json.dumps({"version": version}).encode()
        for _ in range(_SWAP_ATTEMPTS):
            found = self._backend.read_with_etag(key)
            if found and found[0] == data:
                return
            if self._backend.replace(key, data, found[1] if found else None):
                return
        raise RefConflict(f"the ref {key} keeps moving; is another run writing it in a loop?")

    def ref(self, recipe: str, stage: str) -> str | None:
        """The version a recipe's ref points at."""
        found = self._backend.read_with_etag(f"refs/{recipe}/{stage}.json")
        return json.loads(found[0])["version"] if found else None

    def refs(self) -> list[tuple[str, str, str]]:
        """All refs as (recipe, stage, version)."""
        found: list[tuple[str, str, str]] = []
        for entry in self._backend.list("refs/"):
            _, recipe, name = entry.key.split("/")
            value: dict[str, Any] = json.loads(self._backend.read(entry.key))
            found.append((recipe, name.removesuffix(".json"), value["version"]))
        return found
