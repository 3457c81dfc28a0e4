"""Find and remove what nobody needs any more.

Kept: what a ref points at, what a recent run made or used, all that these were made from, and
whatever was written within the grace period, so that a run under way is never disturbed. A run
records its artifacts before it looks whether they are there; the records are read again while an
artifact is taken away, and it is put back when somebody chose it meanwhile.
"""

import datetime as dt
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from storage.artifact import artifact_key
from storage.catalog import ArtifactInfo, list_artifacts
from storage.errors import StoreError
from storage.lineage import reachable
from storage.manifest import MANIFEST
from storage.runs import Record, artifacts_of, newest_run_of, started_at
from storage.store import Store

KEEP_RUNS_DAYS, GRACE_HOURS = 14.0, 24.0
# A run that does not say that it ended may be at work; after so long it was killed.
RUNNING_DAYS = 90.0


class Garbage(NamedTuple):
    """What can go, and why what stays stays."""

    artifacts: tuple[ArtifactInfo, ...]
    runs: tuple[str, ...]  # ids of old run records
    scratch: tuple[Path, ...]  # this machine's folders of work in progress that nobody goes on with
    kept: int  # artifacts that are needed
    in_grace: int  # artifacts that nobody needs but that are too young to go
    busy: int = 0  # artifacts that stayed because somebody is writing or just chose them

    @property
    def bytes(self) -> int:
        """Bytes of data that would be free."""
        return sum(info.bytes for info in self.artifacts)


def find_garbage(
    store: Store, *, keep_runs_days: float = KEEP_RUNS_DAYS, grace_hours: float = GRACE_HOURS
) -> Garbage:
    """What could be removed now; removes nothing.

    Args:
        store: the store.
        keep_runs_days: artifacts of runs that started so many days ago or later are kept.
        grace_hours: what was written so many hours ago or later is kept.

    Raises:
        StoreError: a ref, a run record or a needed artifact is damaged, so that what is needed is
            not known.
    """
    infos = list_artifacts(store)
    runs = _readable_runs(store)
    now = dt.datetime.now(dt.UTC)
    recent = {run_id: run for run_id, run in runs.items() if _is_recent(run, now, keep_runs_days)}
    needed = reachable(_by_refs(store) | _used(recent), infos)
    for info in infos:
        if (
            info.name in needed
            and info.inputs is None
            and info.state in ("corrupt", "other format")
        ):
            raise StoreError(
                f"{info.reason}. It is needed, and what it was made from cannot be read, so "
                f"nothing is removed; `fpo store repair {info.name}` first"
            )
    young = time.time() - 3600 * grace_hours
    unneeded = [info for info in infos if info.name not in needed]
    old = tuple(info for info in unneeded if info.modified <= young)
    staying = {info.name for info in infos} - {info.name for info in old}
    # Repair takes an artifact's settings from the newest run that names it.
    wanted = {*recent, *newest_run_of(runs, staying).values()}
    return Garbage(
        old, tuple(sorted(set(runs) - wanted)), tuple(_old_scratch(store, young)),
        len(infos) - len(unneeded), len(unneeded) - len(old),
    )  # fmt: skip


def remove_garbage(
    store: Store, *, keep_runs_days: float = KEEP_RUNS_DAYS, grace_hours: float = GRACE_HOURS
) -> Garbage:
    """Remove it; returns what went.

    Raises:
        StoreError: as ``find_garbage`` does.
    """
    known = set(store.runs())
    limits = {"keep_runs_days": keep_runs_days, "grace_hours": grace_hours}
    found = find_garbage(store, **limits)
    # A listing has no checksum: what is to go has to be seen twice.
    twice = {info.name for info in find_garbage(store, **limits).artifacts}
    gone = [info for info in found.artifacts if info.name in twice and _remove(store, info, known)]
    scratch = [folder for folder in found.scratch if _remove_scratch(store, folder)]
    store.remove_runs(found.runs)
    store.backend.sweep("artifacts/", 3600 * grace_hours)
    return found._replace(
        artifacts=tuple(gone), scratch=tuple(scratch), busy=len(found.artifacts) - len(gone)
    )


def _remove(store: Store, info: ArtifactInfo, known_runs: set[str]) -> bool:
    """Remove one artifact, unless somebody writes it, or chose it since ``known_runs``."""
    key = f"{artifact_key(info.stage, info.version)}/{MANIFEST}"
    with store.hold(info.stage, info.version, None) as hold:
        if hold is None:
            return False
        found = store.backend.read_with_etag(key)
        store.backend.delete([key])  # from here on nobody reuses it
        started = {run_id: run or {} for run_id, run in store.runs(but=known_runs).items()}
        if info.name in _used(started) | _by_refs(store):
            if found:
                store.backend.create(key, found[0])
            return False
        store.discard(info.stage, info.version)
    return True


def _old_scratch(store: Store, young: float) -> list[Path]:
    """Folders of work in progress in which nothing was written for the grace period."""
    root = store.backend.scratch
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(folder for folder in folders if _last_change(folder) <= young)


def _last_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _remove_scratch(store: Store, folder: Path) -> bool:
    stage, _, version = folder.name.rpartition("-")
    with store.hold(stage or "scratch", version, None) as hold:
        if hold is None:
            return False
        shutil.rmtree(folder, ignore_errors=True)
    return True


def _readable_runs(store: Store) -> dict[str, Record]:
    runs = store.runs()
    damaged = [run_id for run_id, run in runs.items() if run is None]
    if damaged:
        raise StoreError(
            f"the run record runs/{damaged[0]}.json cannot be read, and what it used may be "
            f"needed, so nothing is removed; remove the record if it may go"
        )
    return {run_id: run for run_id, run in runs.items() if run is not None}


def _by_refs(store: Store) -> set[str]:
    names = set()
    for ref in store.refs():
        if ref.version is None:
            raise StoreError(
                f"the ref refs/{ref.recipe}/{ref.stage}.json cannot be read, and what it points at "
                f"may be needed, so nothing is removed; run the recipe again, which writes it, or "
                f"remove it"
            )
        names.add(f"{ref.stage}/{ref.version}")
    return names


def _is_recent(run: Record, now: dt.datetime, keep_days: float) -> bool:
    days = max(keep_days, RUNNING_DAYS) if run.get("state") == "running" else keep_days
    return started_at(run) >= now - dt.timedelta(days=days)


def _used(runs: Mapping[str, Record]) -> set[str]:
    """The artifacts that runs made or used: a run's record names all of its recipe's."""
    return set().union(*(artifacts_of(run) for run in runs.values()))
