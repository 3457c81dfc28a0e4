"""Copy artifacts from one store to another: verified on both sides, resumable, manifest last."""

import uuid
from collections.abc import Callable, Iterable
from typing import NamedTuple

from storage.artifact import Artifact, artifact_key
from storage.catalog import ArtifactInfo
from storage.lineage import reachable
from storage.manifest import MANIFEST
from storage.runs import newest_run_of
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
    source: Store,
    target: Store,
    info: ArtifactInfo,
    on_bytes: Callable[[int], None],
    on_wait: Callable[[], None] = lambda: None,
) -> Copied:
    """Copy one artifact; what an interrupted copy finished is not sent again.

    Args:
        source: where it is.
        target: where it goes.
        info: which.
        on_bytes: told of bytes as they are stored.
        on_wait: called when another run is writing it there and this one begins to wait.

    Raises:
        ArtifactCorrupt: a file of the source is damaged; nothing of it is committed.
    """
    artifact = source.artifact(info.stage, info.version)
    moved = 0
    with target.hold(info.stage, info.version, on_wait) as hold:
        assert hold is not None
        if target.state(info.stage, info.version) == "complete":
            on_bytes(artifact.manifest["bytes"])
            return Copied(info.name, "there already", 0)
        target.writer(info.stage, info.version, hold)
        there = target.backend.intact({artifact.key(f): r for f, r in artifact.files.items()})
        for file, record in artifact.files.items():
            key = artifact.key(file)
            # Another attempt's file may be there, of the same size: every byte counts.
            if key in there and target.backend.damage(key, record) is None:
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


def copy_records(source: Store, target: Store, names: Iterable[str], *, move_refs: bool) -> None:
    """Take along what refers to copied artifacts: refs, and the newest run that names each.

    Without them a clean-up of the target would remove the copies, and nothing could repair them.

    Args:
        source: where they were copied from.
        target: where they are now.
        names: of the artifacts that were copied.
        move_refs: whether refs that the target has already follow the source's.
    """
    copied = set(names)
    for ref in source.refs():
        known = ref.version and f"{ref.stage}/{ref.version}" in copied
        if known and (move_refs or target.ref(ref.recipe, ref.stage) is None):
            target.set_ref(ref.recipe, ref.stage, str(ref.version))
    runs = source.runs()
    there = target.runs()
    for run_id in set(newest_run_of(runs, copied).values()) - set(there):
        record = runs[run_id]
        assert record is not None
        target.put_run(run_id, record)
    # Data keeps the day it was first tokenized, or the copies would not be found again.
    for data, date in source.dates().items():
        target.record_date(data, date)
