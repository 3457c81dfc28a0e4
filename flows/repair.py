"""Compute damaged artifacts again: their bad shards only, with the settings that made them."""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fpo_core.errors import FPOError
from fpo_core.recipe import load_recipe
from storage.errors import ArtifactCorrupt
from storage.store import Store
from storage.verify import Verdict
from tasks.plan import STAGES, Plan, StagePlan, kind_of, make_plan
from tasks.run import prepare_run

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
    bad = [(verdict, _origins(store, verdict.name)) for verdict in verdicts if not verdict.ok]
    bad.sort(key=lambda item: STAGES.index(kind_of(item[1][0].stage)))
    return [_repair(store, verdict, origins) for verdict, origins in bad]


def _origins(store: Store, name: str) -> list[_Origin]:
    """The runs that name an artifact, newest first: on a shared store also other people's."""
    found = []
    for _, run in sorted(store.runs().items(), reverse=True):
        for stage, made in (run or {}).get("artifacts", {}).items():
            if run and made == name and kind_of(stage) in STAGES:
                found.append(_Origin(stage, run["settings"]))
    if not found:
        raise FPOError(
            f"{name}: the store has no record of a run that made it; compute it again with `fpo "
            f"run RECIPE --only STAGE --force` and the settings it was made with"
        )
    return found


def _repair(store: Store, verdict: Verdict, origins: Sequence[_Origin]) -> Repaired:
    """By the first of the runs whose model, data and settings still give the artifact."""
    why_not: list[FPOError] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "repair.yaml"
        for origin in origins:
            # In the store that is open here, whatever store the run named.
            settings = {**origin.settings, "store": store.backend.place}
            recipe.write_text(yaml.safe_dump(settings))
            try:
                plan = make_plan(load_recipe(str(recipe)), store)
                planned = _planned_as_made(plan, origin, verdict.name)
            except FPOError as error:
                why_not.append(error)
                continue
            return _compute_again(store, verdict, planned, recipe, str(settings["name"]))
    raise why_not[0]


def _compute_again(
    store: Store, verdict: Verdict, planned: StagePlan, recipe: Path, recipe_name: str
) -> Repaired:
    from flows.local import Given, run_pipeline

    before = _former_files(store, planned)
    with store.hold(planned.artifact, planned.version, None) as hold:
        if hold is None:
            raise FPOError(f"{verdict.name} is being written by another run just now")
        store.unfinish(planned.artifact, planned.version, verdict.bad_files)
    log.info("%s: computing again %s", verdict.name, ", ".join(verdict.bad_files) or "nothing")
    pointed_at = store.ref(recipe_name, planned.artifact)
    try:
        given: Given = {"recipe": str(recipe), "only_stage": planned.stage, "store": store.url}
        run, stages = prepare_run(str(recipe), (), store.url, only=planned.stage)
        run_pipeline(run, stages, None, given)
    finally:
        # Repairing an older artifact does not make it the recipe's latest.
        if pointed_at and store.ref(recipe_name, planned.artifact) == planned.version:
            store.set_ref(recipe_name, planned.artifact, pointed_at)
    after = store.artifact(planned.artifact, planned.version).files
    return Repaired(verdict.name, tuple(sorted(verdict.bad_files)), before == dict(after))


def _planned_as_made(plan: Plan, origin: _Origin, name: str) -> StagePlan:
    planned = plan.stages.get(origin.stage)
    if planned and f"{planned.artifact}/{planned.version}" == name:
        missing = [
            other.name
            for other in plan.stages.values()
            if other.name in planned.made_from and other.state != "complete"
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
