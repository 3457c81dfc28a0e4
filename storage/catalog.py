"""What is in a store: one line an artifact, finished or not."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from storage.backend import Entry, in_parallel
from storage.errors import ArtifactCorrupt, ArtifactMissing, OtherFormat, StoreError
from storage.manifest import MANIFEST, Manifest, file_records
from storage.store import Store


class ArtifactInfo(NamedTuple):
    """One line of a store's listing."""

    stage: str
    version: str
    state: Literal["complete", "partial", "corrupt", "other format"]
    rows: int | None
    bytes: int
    created: str | None  # when it was finished
    modified: float  # of its newest file, seconds since 1970
    refs: tuple[str, ...]  # recipes
    reason: str = ""  # why it is neither complete nor partial
    inputs: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """``stage/version``."""
        return f"{self.stage}/{self.version}"


def list_artifacts(store: Store) -> list[ArtifactInfo]:
    """All artifacts, sorted by name.

    ``corrupt`` is what shows without reading the data: a manifest that is damaged, a file that is
    missing or of the wrong size. ``storage.verify`` reads everything.
    """
    files: dict[tuple[str, str], dict[str, Entry]] = {}
    for entry in store.backend.list("artifacts/"):
        parts = entry.key.split("/", 3)
        if len(parts) == 4:  # else a stray file beside the artifacts
            files.setdefault((parts[1], parts[2]), {})[parts[3]] = entry
    refs: dict[tuple[str, str], list[str]] = {}
    for ref in store.refs():
        if ref.version:
            refs.setdefault((ref.stage, ref.version), []).append(ref.recipe)

    def info(found: tuple[tuple[str, str], dict[str, Entry]]) -> ArtifactInfo:
        (stage, version), inside = found
        return _info(store, stage, version, inside, tuple(sorted(refs.get(found[0], ()))))

    return in_parallel(store.backend, info, files.items())


def _info(
    store: Store, stage: str, version: str, inside: Mapping[str, Entry], refs: tuple[str, ...]
) -> ArtifactInfo:
    size = sum(entry.size for name, entry in inside.items() if name.startswith("data/"))
    modified = max(entry.modified for entry in inside.values())
    if MANIFEST not in inside:
        return ArtifactInfo(stage, version, "partial", None, size, None, modified, refs)
    try:
        manifest = store.artifact(stage, version).manifest
    except ArtifactMissing:  # removed while we looked
        return ArtifactInfo(stage, version, "partial", None, size, None, modified, refs)
    except (ArtifactCorrupt, OtherFormat) as error:
        state = "corrupt" if isinstance(error, ArtifactCorrupt) else "other format"
        return ArtifactInfo(stage, version, state, None, size, None, modified, refs, str(error))
    reason = _missing_or_cut(manifest, inside)
    return ArtifactInfo(
        stage, version, "corrupt" if reason else "complete", manifest["rows"], manifest["bytes"],
        manifest["created"], modified, refs, reason, manifest["inputs"],
    )  # fmt: skip


def _missing_or_cut(manifest: Manifest, inside: Mapping[str, Entry]) -> str:
    for name, record in file_records(manifest).items():
        entry = inside.get(f"data/{name}")
        if entry is None:
            return f"{name} is missing"
        if entry.size != record.bytes:
            return f"{name} has {entry.size} bytes, written were {record.bytes}"
    return ""


def find_artifact(
    store: Store, name: str, infos: Sequence[ArtifactInfo] | None = None
) -> ArtifactInfo:
    """The artifact named ``stage/version``, or by the start of either.

    Args:
        store: the store.
        name: the artifact's.
        infos: the store's listing, where it was made already.

    Raises:
        ArtifactMissing: none matches.
        StoreError: several do.
    """
    matches = [
        info
        for info in (list_artifacts(store) if infos is None else infos)
        if info.name.startswith(name) or info.version.startswith(name)
    ]
    if not matches:
        raise ArtifactMissing(
            f"no artifact {name!r} in the store {store.url!r}; see `fpo store ls`"
        )
    if len(matches) > 1:
        every = ", ".join(info.name for info in matches)
        raise StoreError(f"{name!r} is ambiguous: {every}")
    return matches[0]
