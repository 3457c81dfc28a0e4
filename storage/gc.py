"""Find and remove what nobody needs any more.

Kept: what a ref points at, what a recent run made or used, all that these were made from, and
whatever was written within the grace period, so that a run under way is never disturbed. A run
records its artifacts before it looks whether they are there, and the records are read once more
before anything is removed.
"""

import datetime as dt
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from storage.catalog import ArtifactInfo, list_artifacts
from storage.errors import StoreError
from storage.lineage import reachable
from storage.store import Store

KEEP_RUNS_DAYS, GRACE_HOURS = 14.0, 24.0


class Garbage(NamedTuple):
    """What can go, and why what stays stays."""

    artifacts: tuple[ArtifactInfo, ...]
    runs: tuple[str, ...]  # ids of old run records
    kept: int  # artifacts
    in_grace: int  # artifacts that nobody needs but that are too young to go

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
        StoreError: a needed artifact is damaged, so that what it was made from is not known.
    """
    infos = list_artifacts(store)
    runs = store.runs()
    recent_from = dt.datetime.now(dt.UTC) - dt.timedelta(days=keep_runs_days)
    recent = {run_id: run for run_id, run in runs.items() if _started(run) >= recent_from}
    by_ref = {f"{ref.stage}/{ref.version}" for ref in store.refs() if ref.version}
    needed = reachable(by_ref | _used(recent), infos)
    for info in infos:
        if info.name in needed and info.state == "corrupt" and info.inputs is None:
            raise StoreError(
                f"{info.reason}. It is needed, and what it was made from cannot be read, so "
                f"nothing is removed; `fpo store repair {info.name}` first"
            )
    young = time.time() - 3600 * grace_hours
    unneeded = [info for info in infos if info.name not in needed]
    old = tuple(info for info in unneeded if info.modified <= young)
    return Garbage(
        old, tuple(sorted(set(runs) - set(recent))), len(needed), len(unneeded) - len(old)
    )


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
    gone, chosen_since = [], set()
    for info in found.artifacts:
        started = store.runs(but=known)  # since we looked: they may be about to reuse it
        known |= set(started)
        chosen_since |= _used(started)
        if info.name in chosen_since or info.name not in twice:
            continue
        with store.hold(info.stage, info.version, None) as hold:
            if hold is None:
                continue  # somebody writes it just now
            store.discard(info.stage, info.version)
        gone.append(info)
    store.backend.delete([f"runs/{run_id}.json" for run_id in found.runs])
    store.backend.sweep("", 3600 * grace_hours)
    return found._replace(artifacts=tuple(gone))


def _used(runs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The artifacts that runs made or used: a run's record names all of its recipe's."""
    names: set[str] = set()
    for run in runs.values():
        artifacts = run.get("artifacts")
        names.update(artifacts.values() if isinstance(artifacts, dict) else ())
    return names


def _started(run: Mapping[str, Any]) -> dt.datetime:
    """When a run started; now where its record does not say, so that it is kept."""
    try:
        return dt.datetime.fromisoformat(run["started"])
    except (KeyError, TypeError, ValueError):
        return dt.datetime.now(dt.UTC)
