"""Finished runs by the names that people have for them, and the settings they were made with.

A run that can be compared is an evaluation and what it was made from. The settings come from the
artifacts' manifests, which are what was computed; a run's record is kept for a while only and says
no more than the names of models, SAEs and data, whose content the manifests know.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fpo_core.errors import FPOError, UsageError
from storage.artifact import Artifact
from storage.catalog import ArtifactInfo, list_artifacts
from storage.lineage import input_artifacts
from storage.runs import newest_run_of
from storage.store import Store

EVALUATION, POLICY = "evaluation", "policy"
SHOWN = 12
DIGEST = 12


class FinishedRun(NamedTuple):
    """One run that came to its evaluation."""

    given: str  # how the command line named it
    evaluation: Artifact
    policy: Artifact
    pairs: Artifact
    settings: dict[str, Any]  # by the recipe's key, "train.alpha"


class StoredRuns:
    """What a store knows of finished runs, read once.

    Args:
        store: where the artifacts are.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.infos = list_artifacts(store)
        self.records = store.runs()
        evaluations = {info.name for info in self.infos if info.stage == EVALUATION}
        self._newest = newest_run_of(self.records, evaluations)

    def find(self, names: Sequence[str]) -> list[FinishedRun]:
        """The runs of these names, in their order.

        Args:
            names: each a recipe, the id of a run, or ``evaluation/VERSION`` or ``policy/VERSION``;
                the start of an id or version is enough.

        Raises:
            UsageError: fewer than two, or one run by two names.
            FPOError: a name of nothing, of several, or of a run that has no evaluation.
        """
        if len(names) < 2:
            raise UsageError(
                f"a comparison takes at least two runs, {len(names) or 'none'} given. "
                f"{self._there_is()}"
            )
        seen: dict[str, str] = {}
        for name in names:
            version = self._evaluation(name)
            if version in seen:
                raise UsageError(
                    f"{seen[version]!r} and {name!r} are the same run, evaluation/{version}"
                )
            seen[version] = name
        runs = [self._run(name, version) for version, name in seen.items()]
        called: dict[str, str] = {}
        for run in reversed(runs):
            called |= self._names(run)
        return [_with_names(run, called) for run in runs]

    def of_policy(self, stage: str, policy: Artifact) -> list[Artifact]:
        """The finished artifacts of a kind that were made from a policy."""
        return [
            self.store.artifact(info.stage, info.version)
            for info in self.infos
            if info.stage == stage and info.state == "complete"
            and policy.name in input_artifacts(info.inputs or {}).values()
        ]  # fmt: skip

    def _evaluation(self, name: str) -> str:
        """The version of the evaluation that a name stands for."""
        if name in self.records:
            return self._of_record(name)
        stages = {ref.stage: ref.version for ref in self.store.refs() if ref.recipe == name}
        if stages:
            return self._finished(stages.get(EVALUATION), f"recipe {name!r}")
        matches = [
            info
            for info in self.infos
            if info.stage in (EVALUATION, POLICY)
            and (info.name.startswith(name) or info.version.startswith(name))
        ]
        ids = [run_id for run_id in self.records if run_id.startswith(name)]
        found = [info.name for info in matches] + [f"run {run_id}" for run_id in ids]
        if not name or not found:
            raise FPOError(f"no run {name!r} in the store {self.store.url!r}. {self._there_is()}")
        if len(found) > 1:
            raise FPOError(f"{name!r} is ambiguous: {', '.join(found)}")
        return self._of_artifact(matches[0]) if matches else self._of_record(ids[0])

    def _of_record(self, run_id: str) -> str:
        record = self.records[run_id]
        if record is None:
            raise FPOError(f"the record of run {run_id} cannot be read")
        named = record.get("artifacts", {}).get("evaluate", "")
        version = named.partition("/")[2] or None
        return self._finished(version, f"run {run_id} ({record.get('state', 'no state')})")

    def _of_artifact(self, info: ArtifactInfo) -> str:
        if info.stage == EVALUATION:
            return self._finished(info.version, info.name)
        found = [
            other.version
            for other in self.infos
            if other.stage == EVALUATION
            and info.name in input_artifacts(other.inputs or {}).values()
        ]
        if len(found) > 1:
            every = ", ".join(f"evaluation/{version}" for version in found)
            raise FPOError(f"{info.name} has several evaluations; name one: {every}")
        return self._finished(found[0] if found else None, info.name)

    def _finished(self, version: str | None, whose: str) -> str:
        states = {info.version: info.state for info in self.infos if info.stage == EVALUATION}
        if version is None or states.get(version) != "complete":
            raise FPOError(
                f"{whose} has no finished evaluation in the store {self.store.url!r}; `fpo run` "
                f"with its recipe and the same --set makes it. {self._there_is()}"
            )
        return version

    def _there_is(self) -> str:
        """The runs that could be named, newest first."""
        there = [i for i in self.infos if i.stage == EVALUATION and i.state == "complete"]
        if not there:
            return "It holds no finished evaluation; `fpo run quickstart` makes one"
        there.sort(key=lambda info: info.created or "", reverse=True)
        lines = [f"  {info.name}{self._described(info)}" for info in there[:SHOWN]]
        if len(there) > SHOWN:
            lines.append(f"  and {len(there) - SHOWN} more; see `fpo store ls`")
        return "\n".join(["There are:", *lines])

    def _described(self, info: ArtifactInfo) -> str:
        run_id = self._newest.get(info.name)
        record = self.records.get(run_id) if run_id else None
        method = self._method(info)
        recipe = f"recipe {record.get('recipe')}, " if record else ""
        return f"  ({recipe}{method})"

    def _method(self, info: ArtifactInfo) -> str:
        name = input_artifacts(info.inputs or {}).get(POLICY, "")
        if not any(other.name == name and other.state == "complete" for other in self.infos):
            return "its policy is gone"
        policy = self.store.artifact(POLICY, name.partition("/")[2])
        return str(policy.manifest["recipe"].get("method"))

    def _run(self, given: str, version: str) -> FinishedRun:
        evaluation = self.store.artifact(EVALUATION, version)
        inputs = input_artifacts(evaluation.manifest["inputs"])

        def made_of(role: str) -> Artifact:
            return self.store.artifact(*inputs[role].split("/"))

        policy, pairs = made_of(POLICY), made_of("pairs")
        settings = {
            **_contents(policy, pairs),
            **self._places(policy),
            **_section("train", policy, but=("attention", "parts")),
            **_section("data", pairs),
            **_section("model", made_of("reference")),
            **_section("features", made_of("features"), but=("layer", "site", "pinned", "dtype",
                                                             "attention")),
            **_section("evaluation", evaluation, but=("k", "attention")),
        }  # fmt: skip
        # Code of another version may compute the same settings differently.
        for artifact in (policy, evaluation):
            settings[f"{artifact.stage} schema"] = artifact.manifest["schema_version"]
        return FinishedRun(given, evaluation, policy, pairs, settings)

    def _names(self, run: FinishedRun) -> dict[str, str]:
        """What the newest record of a run calls its model, SAEs and data, by their content."""
        record = self.records.get(self._newest.get(run.evaluation.name, ""))
        if record is None:
            return {}
        named = record.get("settings", {})
        data, saes = named.get("data", {}), named.get("sae", {})
        sources = [saes.get("source"), *(one.get("source") for one in saes.get("also", ()))]
        names = {
            "model": [named.get("model", {}).get("source")],
            "sae": sources,
            "data.train": _source_names(data.get("train", ())),
            "data.heldout": _source_names(data.get("heldout", ())),
        }
        return {
            run.settings[key]: " + ".join(_last_part(source) for source in found)
            for key, found in names.items()
            if found and all(found)
        }

    def _places(self, policy: Artifact) -> dict[str, str]:
        """Where the SAEs of the objective read: layers and sites, of all of them."""
        artifacts = input_artifacts(policy.manifest["inputs"])
        caches = [name for role, name in artifacts.items() if role.partition("@")[0] == "features"]
        recipes = [self.store.artifact(*name.split("/")).manifest["recipe"] for name in caches]
        layers = sorted(recipe["layer"] for recipe in recipes)
        sites = sorted({recipe["site"] for recipe in recipes})
        return {"sae.layer": "+".join(map(str, layers)), "sae.site": "+".join(sites)}


def _section(name: str, artifact: Artifact, but: Sequence[str] = ()) -> dict[str, Any]:
    recipe = artifact.manifest["recipe"]
    return {f"{name}.{key}": value for key, value in recipe.items() if key not in but}


def _contents(policy: Artifact, pairs: Artifact) -> dict[str, str]:
    """Model, reference, SAEs and data, as their content is known."""
    inputs, data = policy.manifest["inputs"], pairs.manifest["inputs"]
    saes = [value for role, value in inputs.items() if role.partition("@")[0] == "sae"]
    found = {"model": data["model"], "sae": " + ".join(saes)}
    if inputs["model"] != data["model"]:
        found["reference"] = inputs["model"]
    return {**found, "data.train": data["train"], "data.heldout": data["heldout"]}


def _with_names(run: FinishedRun, called: Mapping[str, str]) -> FinishedRun:
    """A run whose contents are called by a name, and the start of their digest.

    The same content has one name in all runs, whatever their records call it.
    """
    shown = {
        key: f"{called[content]} ({_short(content)})" if content in called else _short(content)
        for key, content in run.settings.items()
        if key in ("model", "reference", "sae", "data.train", "data.heldout")
    }
    return run._replace(settings={**run.settings, **shown})


def _source_names(sources: Any) -> list[str]:
    """Return the names of data sources in a run's record: paths, objects with one, or a share."""
    if isinstance(sources, Mapping):
        return [f"{sources['fraction']:g} of the training prompts"]
    return [source if isinstance(source, str) else source["path"] for source in sources]


def _last_part(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2]


def _short(content: str) -> str:
    """The start of each digest in a content's identity."""
    parts = (part.removeprefix("artifact:").rpartition(":")[2] for part in content.split(" + "))
    return " + ".join(part if "/" in part else part[:DIGEST] for part in parts)
