"""Records of pipeline runs: which artifacts they made or used, and when."""

import datetime as dt
from collections.abc import Collection, Mapping
from typing import Any

Record = Mapping[str, Any]


def artifacts_of(run: Record) -> set[str]:
    """The artifacts of a run's recipe, ``stage/version``: made or used."""
    artifacts = run.get("artifacts")
    return set(artifacts.values()) if isinstance(artifacts, dict) else set()


def started_at(run: Record) -> dt.datetime:
    """When a run started; now where its record does not say, so that it is kept."""
    try:
        started = dt.datetime.fromisoformat(run["started"])
    except (KeyError, TypeError, ValueError):
        return dt.datetime.now(dt.UTC)
    return started if started.tzinfo else started.replace(tzinfo=dt.UTC)


def newest_run_of(runs: Mapping[str, Record | None], names: Collection[str]) -> dict[str, str]:
    """For each of the artifacts, the id of the newest readable run that names it."""
    found: dict[str, str] = {}
    readable = ((run_id, run) for run_id, run in runs.items() if run is not None)
    for run_id, run in sorted(readable, key=lambda item: started_at(item[1])):
        found.update(dict.fromkeys(artifacts_of(run) & set(names), run_id))
    return found
