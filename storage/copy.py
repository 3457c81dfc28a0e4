"""Copy artifacts from one store to another: verified on both sides, resumable, manifest last."""

import uuid
from collections.abc import Callable, Iterable
from typing import NamedTuple

from storage.artifact import Artifact, artifact_key
from storage.catalog import ArtifactInfo
from storage.lineage import reachable
from storage.manifest import MANIFEST
from storage.store import Store


class Copied(NamedTuple):
    """What became of one artifact."""

    name: str
    state: str  # copied, or there already
    bytes: int  # moved now


def with_ancestors(names: Iterable[str], infos: Iterable[ArtifactInfo]) -> list[ArtifactInfo]:
    """The finished artifacts that the named ones need, inputs before what is made from them."""
    every = list(infos)
    needed = reachable(names, every)
    chosen = [info for info in every if info.name in needed and info.state == "complete"]
    return sorted(chosen, key=lambda info: (len(reachable([info.name], every)), info.name))


def copy_artifact(
    source: Store, target: Store, info: ArtifactInfo, on_bytes: Callable[[int], None]
) -> Copied:
    """Copy one artifact; what an interrupted copy finished is not sent again.

    Args:
        source: where it is.
        target: where it goes.
        info: which.
        on_bytes: told of bytes as they are stored.

    Raises:
        ArtifactCorrupt: a file of the source is damaged; nothing of it is committed.
    """
    artifact = source.artifact(info.stage, info.version)
    moved = 0
    with target.hold(info.stage, info.version, lambda: None) as hold:
        assert hold is not None
        if target.state(info.stage, info.version) == "complete":
            on_bytes(artifact.manifest["bytes"])
            return Copied(info.name, "there already", 0)
        target.writer(info.stage, info.version, hold)
        stored = target.backend.intact({artifact.key(f): r for f, r in artifact.files.items()})
        for file, record in artifact.files.items():
            if artifact.key(file) in stored:
                on_bytes(record.bytes)
                continue
            hold.check()
            _copy_file(artifact, file, target, on_bytes)
            moved += record.bytes
        key = artifact_key(info.stage, info.version)
        for entry in source.backend.list(f"{key}/parts/"):
            target.backend.put(entry.key, source.backend.read(entry.key))
        target.backend.create(f"{key}/{MANIFEST}", source.backend.read(f"{key}/{MANIFEST}"))
    return Copied(info.name, "copied", moved)


def _copy_file(
    artifact: Artifact, file: str, target: Store, on_bytes: Callable[[int], None]
) -> None:
    target.backend.scratch.mkdir(parents=True, exist_ok=True)
    staged = target.backend.scratch / f"copy-{uuid.uuid4().hex}"
    try:
        artifact.copy_to(file, staged)
        target.backend.put_file(artifact.key(file), staged, on_bytes)
    finally:
        staged.unlink(missing_ok=True)


def copy_refs(source: Store, target: Store) -> None:
    """Point the target's refs at what the source's point at, where that was copied."""
    for ref in source.refs():
        if ref.version and target.state(ref.stage, ref.version) == "complete":
            target.set_ref(ref.recipe, ref.stage, ref.version)
