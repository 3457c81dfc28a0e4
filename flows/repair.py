"""Compute damaged artifacts again: their bad shards only, with the settings that made them."""

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fpo_core.errors import FPOError
from fpo_core.recipe import load_recipe
from storage.errors import ArtifactCorrupt
from storage.store import Store
from storage.verify import Verdict
from tasks.plan import STAGES, Plan, StagePlan, make_plan

log = logging.getLogger("fpo.stage")


class Repaired(NamedTuple):
    """What repairing one artifact came to."""

    name: str
    computed_again: tuple[str, ...]  # files
    identical: bool  # whether all files have their former content


class _Origin(NamedTuple):
    """The run that an artifact can be made again from."""

    stage: str
    settings: Mapping[str, Any]


def repair_artifacts(store: Store, verdicts: Iterable[Verdict]) -> list[Repaired]:
    """Repair what verification found damaged, inputs before what is made from them.

    Raises:
        FPOError: an artifact that cannot be made again, and why; those before it are repaired.
    """
    bad = [(verdict, _origin(store, verdict.name)) for verdict in verdicts if not verdict.ok]
    bad.sort(key=lambda item: STAGES.index(item[1].stage))
    return [_repair(store, verdict, origin) for verdict, origin in bad]


def _origin(store: Store, name: str) -> _Origin:
    for _, run in sorted(store.runs().items(), reverse=True):
        for stage, made in run.get("artifacts", {}).items():
            if made == name and stage in STAGES:
                return _Origin(stage, run["settings"])
    raise FPOError(
        f"{name}: the store has no record of a run that made it; compute it again with `fpo run "
        f"RECIPE --only STAGE --force` and the settings it was made with"
    )


def _repair(store: Store, verdict: Verdict, origin: _Origin) -> Repaired:
    from flows.pipeline import fpo_pipeline

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "repair.yaml"
        recipe.write_text(yaml.safe_dump(dict(origin.settings)))
        planned = _planned_as_made(make_plan(load_recipe(str(recipe)), store), origin, verdict.name)
        before = _former_files(store, planned)
        with store.hold(planned.artifact, planned.version, None) as hold:
            if hold is None:
                raise FPOError(f"{verdict.name} is being written by another run just now")
            store.unfinish(planned.artifact, planned.version, verdict.bad_files)
        log.info("%s: computing again %s", verdict.name, ", ".join(verdict.bad_files) or "nothing")
        name = origin.settings["name"]
        pointed_at = store.ref(name, planned.artifact)
        fpo_pipeline(recipe=str(recipe), only_stage=origin.stage, store=store.url)
        if pointed_at:  # repairing an older artifact does not make it the recipe's latest
            store.set_ref(name, planned.artifact, pointed_at)
    after = store.artifact(planned.artifact, planned.version).files
    return Repaired(verdict.name, tuple(sorted(verdict.bad_files)), before == dict(after))


def _planned_as_made(plan: Plan, origin: _Origin, name: str) -> StagePlan:
    planned = plan.stages.get(origin.stage)
    if planned and f"{planned.artifact}/{planned.version}" == name:
        missing = [
            f"{other.artifact}/{other.version}"
            for other in plan.stages.values()
            if other.version in planned.inputs.values() and other.state != "complete"
        ]
        if missing:
            raise FPOError(f"{name} is made from {', '.join(missing)}: not in this store any more")
        return planned
    raise FPOError(
        f"{name} cannot be made again here: its model, data or SAE files, or this program's "
        f"version of the stage, are not those it was made with"
    )


def _former_files(store: Store, planned: StagePlan) -> Mapping[str, Any]:
    try:
        return dict(store.artifact(planned.artifact, planned.version).files)
    except ArtifactCorrupt:
        return {}
