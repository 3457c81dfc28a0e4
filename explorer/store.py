"""A store opened for looking: its feature caches by the names that people have for them.

from explorer import open_store
cache = open_store("fpo-store").features("quickstart")
cache.stats().sort("difference", descending=True).head().collect()
"""

import re
from pathlib import Path
from typing import Any

from explorer.cache import FeatureCache, SaeIdentity
from explorer.errors import NotReadable, NotThere
from explorer.tokenizer import find_detokenizer
from fpo_core.sae.source import declared_width
from storage.artifact import Artifact
from storage.catalog import ArtifactInfo, list_artifacts
from storage.lineage import input_artifacts
from storage.location import open_store as open_storage
from storage.location import store_url
from storage.runs import newest_run_of
from storage.store import Store
from tasks.plan import SCHEMA_VERSIONS
from tasks.run import PipelineRun

FEATURES = "features"
_RUN = re.compile(r"[\w-]+")  # a run's id


def open_store(url: str | Path | None = None) -> "ExploredStore":
    """Open a store for looking.

    Args:
        url: a folder or ``s3://bucket/prefix``; ``FPO_STORE``'s where it is left out.
    """
    return ExploredStore(open_storage(store_url(None if url is None else str(url))))


class ExploredStore:
    """What there is to browse in a store.

    Args:
        store: the store.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def artifacts(self) -> list[ArtifactInfo]:
        """All artifacts, by name."""
        return list_artifacts(self.store)

    def caches(self) -> list[ArtifactInfo]:
        """The finished feature caches, newest first."""
        found = [i for i in self.artifacts() if i.stage == FEATURES and i.state == "complete"]
        return sorted(found, key=lambda info: info.created or "", reverse=True)

    def features(self, name: str) -> FeatureCache:
        """A feature cache.

        Args:
            name: of the artifact (``features/VERSION``, or the start of the version), or of a
                recipe, whose newest one it is.

        Raises:
            NotThere: there is none of that name, or several.
            NotReadable: it is no feature cache, or of a newer schema than this program's.
        """
        artifact = self._artifact(self._version(name))
        pairs = self._artifact_of(artifact, "pairs")
        settings = self._settings(artifact.name)
        recipes = {ref.recipe for ref in self.store.refs() if ref.version == artifact.version}
        return FeatureCache(
            artifact, pairs, _identity(artifact, settings),
            find_detokenizer(self.store, pairs, settings),
            tuple(sorted(recipes)),
        )  # fmt: skip

    def report(self, run: str) -> bytes:
        """Return the report of a deployed run, an HTML page.

        Raises:
            NotThere: the run does not exist, or has no report.
        """
        missing = NotThere(f"run {run[:80]!r} has no report in this store")
        if not _RUN.fullmatch(run):
            raise missing
        try:
            return self.store.read_run_file(run, "report.html")
        except KeyError:
            raise missing from None

    def _version(self, name: str) -> str:
        for ref in self.store.refs():
            if ref.recipe == name and ref.stage == FEATURES and ref.version:
                return ref.version
        infos = self.artifacts()
        wanted = name.removeprefix(f"{FEATURES}/")
        found = [i for i in infos if i.stage == FEATURES and i.version.startswith(wanted)]
        if len(found) == 1 and found[0].state == "complete":
            return found[0].version
        if len(found) == 1:
            raise NotReadable(f"{found[0].name} is {found[0].state}: {_remedy(found[0])}")
        if found:
            raise NotThere(f"{name!r} is ambiguous: {', '.join(info.name for info in found)}")
        other = [info.name for info in infos if name in (info.name, info.version)]
        if other:
            raise NotReadable(f"{other[0]} has no features; browse a features artifact instead")
        there = ", ".join(info.name for info in infos if info.stage == FEATURES) or "none yet"
        raise NotThere(f"no feature cache {name!r} in this store; there are: {there}")

    def _artifact(self, version: str) -> Artifact:
        artifact = self.store.artifact(FEATURES, version)
        schema, known = artifact.manifest["schema_version"], SCHEMA_VERSIONS[FEATURES]
        if schema > known:
            raise NotReadable(
                f"{artifact.name} has schema {schema}, this program reads up to {known}: update it"
            )
        return artifact

    def _artifact_of(self, artifact: Artifact, role: str) -> Artifact:
        name = input_artifacts(artifact.manifest["inputs"])[role]
        return self.store.artifact(*name.split("/"))

    def _settings(self, name: str) -> dict[str, Any]:
        """The recipe of the newest run of an artifact: names of models and SAEs, if it is kept."""
        records = self.store.runs()
        found = records.get(newest_run_of(records, {name}).get(name, ""))
        return (found or {}).get("settings", {})


def _identity(artifact: Artifact, settings: dict[str, Any]) -> SaeIdentity:
    recipe, saes = artifact.manifest["recipe"], settings.get("sae", {})
    named = [saes, *saes.get("also", ())]
    place = (recipe["layer"], recipe["site"])
    sources = [
        one.get("source")
        for one in named
        if (one.get("layer"), one.get("site", "resid_post")) == place
    ]
    return SaeIdentity(
        artifact.manifest["inputs"]["sae"], next(filter(None, sources), None), recipe["layer"],
        recipe["site"], artifact.manifest["stats"]["d_sae"],
        settings.get("model", {}).get("source"),
    )  # fmt: skip


def _remedy(info: ArtifactInfo) -> str:
    if info.state == "partial":
        return "run its recipe again to finish it"
    return info.reason or "`fpo store repair` computes again what is damaged"


def sae_of_run(run: PipelineRun) -> SaeIdentity:
    """The first SAE of a recipe, whether it has a cache or not."""
    recipe, planned = run.recipe, run.planned(FEATURES)
    place = recipe.hookpoints[0]
    width = declared_width(recipe.sae.source) if recipe.sae.source else None
    trained = recipe.sae.train.d_sae if recipe.sae.train else 0
    return SaeIdentity(
        planned.inputs["sae"], recipe.sae.source, place.layer, place.site, width or trained,
        recipe.model.source,
    )  # fmt: skip
