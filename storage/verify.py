"""Read every byte of a store and compare it with what was written."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from storage.artifact import artifact_key
from storage.catalog import ArtifactInfo
from storage.errors import ArtifactCorrupt, ArtifactMissing
from storage.manifest import version_fault
from storage.store import Store


class Verdict(NamedTuple):
    """What verification found of one artifact."""

    name: str
    bytes: int  # read
    manifest_fault: str  # empty where the manifest is as it was written
    bad_files: dict[str, str]  # file -> what is wrong with it

    @property
    def ok(self) -> bool:
        """Whether all is as it was written."""
        return not self.manifest_fault and not self.bad_files


def verify_artifacts(
    store: Store, infos: Iterable[ArtifactInfo], on_bytes: Callable[[int], None]
) -> list[Verdict]:
    """Verify finished artifacts; partial ones are left out, and those of another format.

    Args:
        store: the store.
        infos: which artifacts.
        on_bytes: told of bytes as they were read.
    """
    unread = ("partial", "other format")
    return [_verify(store, info, on_bytes) for info in infos if info.state not in unread]


def _verify(store: Store, info: ArtifactInfo, on_bytes: Callable[[int], None]) -> Verdict:
    try:
        artifact = store.artifact(info.stage, info.version)
        files, fault = artifact.files, version_fault(artifact.manifest) or ""
    except (ArtifactCorrupt, ArtifactMissing) as error:
        # What the receipts say is then all that is known.
        files, fault = store.received_files(info.stage, info.version), str(error)
    bad = {}
    for file, record in files.items():
        key = f"{artifact_key(info.stage, info.version)}/data/{file}"
        reason = store.backend.damage(key, record)
        if reason:
            bad[file] = reason
        on_bytes(record.bytes)
    return Verdict(info.name, sum(record.bytes for record in files.values()), fault, bad)


def lost_refs(store: Store, infos: Iterable[ArtifactInfo]) -> list[str]:
    """Refs that cannot be read, or that point at an artifact that is not finished here."""
    complete = {info.name for info in infos if info.state != "partial"}
    lost = []
    for ref in store.refs():
        where = f"refs/{ref.recipe}/{ref.stage}.json"
        if ref.version is None:
            lost.append(f"{where} is not a ref")
        elif f"{ref.stage}/{ref.version}" not in complete:
            lost.append(f"{where} points at {ref.stage}/{ref.version}, which is not in the store")
    return lost
