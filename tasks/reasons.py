"""Why a stage has to be computed: what differs from the nearest artifact of its kind.

An artifact's manifest keeps the settings and inputs that its version follows from; the planned
stage has the same. Where an input is what another stage makes, the reason is that stage's.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from storage.catalog import ArtifactInfo, list_artifacts
from storage.lineage import input_artifacts
from storage.store import Store
from tasks.plan import Plan, StagePlan

# The recipe's section that an artifact's settings are of, and those that are of another.
_SECTIONS = {
    "instructions": "sft", "sft": "sft", "sae": "sae.train", "pairs": "data", "reference": "model",
    "features": "features", "policy": "train", "answers": "generation", "scores": "judge",
    "evaluation": "evaluation",
}  # fmt: skip
_ELSEWHERE = {
    "dtype": "model.dtype", "attention": "model.attention", "layer": "sae.layer",
    "site": "sae.site", "pinned": "train.groups", "template": "data.template",
    "system": "data.system", "date": "data.date", "heldout_fraction": "data.heldout.fraction",
    "train_options": "data.train", "heldout_options": "data.heldout", "data_options": "sft.data",
}  # fmt: skip
_DIGEST = 12
_ABSENT = object()


class Change(NamedTuple):
    """One thing that is not as it was."""

    key: str  # the recipe's, or the name of an input
    old: Any
    new: Any
    stage: str | None = None  # that makes the input, where one does

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.old)} -> {_shown(self.new)}"


class Reason(NamedTuple):
    """Why a stage is not simply reused."""

    since: str | None  # the finished artifact that it is compared with
    changes: tuple[Change, ...]
    shards: tuple[int, int | None] | None = None  # finished ones, and all, of one that was begun
    checkpoint: str | None = None  # the newest, of a training that was begun

    def __str__(self) -> str:
        if self.checkpoint:
            return f"goes on from {self.checkpoint}"
        if self.shards and self.shards[0]:
            done, total = self.shards
            return f"{done} of {total} shards done" if total else f"{done} shards done"
        if self.since is None:
            return "nothing of this kind is stored"
        if not self.changes:
            return f"its code writes another schema than {self.since} has"
        parts = [str(change) for change in self.changes if change.stage is None]
        stages = dict.fromkeys(change.stage for change in self.changes if change.stage)
        if stages:
            parts.append(f"follows from {', '.join(stages)}")
        return "; ".join(parts)


def explain_plan(plan: Plan, store: Store) -> dict[str, Reason]:
    """Why each stage that is not complete is to be computed or finished.

    Args:
        plan: of the run.
        store: where earlier artifacts are.
    """
    wanted = {name: stage for name, stage in plan.stages.items() if stage.state != "complete"}
    if not wanted:
        return {}
    kinds = {stage.artifact for stage in wanted.values()}
    finished = [i for i in list_artifacts(store) if i.stage in kinds and i.state == "complete"]
    makers = {stage.name: name for name, stage in plan.stages.items()}
    return {
        name: _reason(
            plan, stage, [info for info in finished if info.stage == stage.artifact], store, makers
        )
        for name, stage in wanted.items()
    }


def _reason(
    plan: Plan,
    stage: StagePlan,
    finished: Sequence[ArtifactInfo],
    store: Store,
    makers: Mapping[str, str],
) -> Reason:
    found = [(info, _changes(stage, _made_of(store, info), makers)) for info in finished]
    # The fewest differences; of several the newest.
    found.sort(key=lambda item: item[0].created or "", reverse=True)
    nearest, changes = min(found, key=lambda item: len(item[1]), default=(None, ()))
    reason = Reason(nearest.name if nearest else None, tuple(changes))
    if stage.state != "partial":
        return reason
    begun = store.begun(stage.artifact, stage.version)
    return reason._replace(shards=(begun.shards, _shards(plan, store)), checkpoint=begun.checkpoint)


def _made_of(store: Store, info: ArtifactInfo) -> dict[str, Any]:
    manifest = store.artifact(info.stage, info.version).manifest
    return {**manifest["inputs"], **manifest["recipe"]}


def _changes(
    stage: StagePlan, earlier: Mapping[str, Any], makers: Mapping[str, str]
) -> list[Change]:
    artifacts = input_artifacts(stage.inputs)
    changes = []
    for key in dict.fromkeys([*stage.made_of, *earlier]):
        old, new = earlier.get(key, _ABSENT), stage.made_of.get(key, _ABSENT)
        if _canonical(old) == _canonical(new):
            continue
        made_by = makers.get(artifacts.get(key, ""))
        name = key if key in stage.inputs else _recipe_key(stage.artifact, key)
        changes.append(Change(name, _plain(old), _plain(new), made_by))
    return changes


def _recipe_key(artifact: str, key: str) -> str:
    if artifact == "evaluation" and key == "k":
        return "train.k"
    return _ELSEWHERE.get(key) or f"{_SECTIONS[artifact]}.{key}"


def _shards(plan: Plan, store: Store) -> int | None:
    """Shards of the pairs, which those of reference and features are aligned with."""
    pairs = plan.stages["tokenize"]
    if pairs.state != "complete":
        return None
    return store.artifact(pairs.artifact, pairs.version).num_shards()


def _plain(value: Any) -> Any:
    return None if value is _ABSENT else value


def _canonical(value: Any) -> str:
    return json.dumps("absent" if value is _ABSENT else value, sort_keys=True, default=str)


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        # Of a digest the start tells as much, and an identity keeps its kind: "model:sha256:…".
        head, _, tail = value.rpartition(":")
        short = f"{tail[:_DIGEST]}…" if len(tail) > 2 * _DIGEST and _is_hex(tail) else tail
        return f"{head}:{short}" if head else short
    return json.dumps(value, default=str)


def _is_hex(text: Iterable[str]) -> bool:
    return all(letter in "0123456789abcdef" for letter in text)
