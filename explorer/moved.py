"""What training moved, feature by feature, on held-out pairs: from a run's evaluation."""

from typing import Any, NamedTuple

import polars as pl

from explorer.cache import FeatureCache
from explorer.errors import NotReadable, NotThere
from explorer.store import ExploredStore
from storage.catalog import find_artifact
from storage.errors import ArtifactMissing
from storage.lineage import input_artifacts

TABLE, WHOLE = "features.parquet", "audit.parquet"
SINCE = ("low", "high", "effect")  # columns that evaluations of schema 4 and later have


class Moved(NamedTuple):
    """Features by how far they moved."""

    evaluation: str
    policy: str
    cache: str  # the features artifact of the reference
    settings: dict[str, Any]  # of the training
    # feature, side, reference, policy, change, low, high, effect, tokens; largest change first
    rows: pl.DataFrame


def moved_features(store: ExploredStore, name: str) -> Moved:
    """How far the policy's mean activations are from the reference's on held-out responses.

    Args:
        store: the store.
        name: of an evaluation, or the start of its version.

    Raises:
        NotThere: there is no such evaluation.
        NotReadable: it is not finished.
    """
    try:
        info = find_artifact(store.store, f"evaluation/{name.removeprefix('evaluation/')}")
    except ArtifactMissing as error:
        raise NotThere(str(error)) from error
    if info.state != "complete":
        raise NotReadable(f"{info.name} is {info.state}: run its recipe again to finish it")
    artifact = store.store.artifact(info.stage, info.version)
    inputs = input_artifacts(artifact.manifest["inputs"])
    policy = store.store.artifact(*inputs["policy"].split("/"))
    frame = pl.read_parquet(artifact.path(TABLE))
    change = pl.col("policy") - pl.col("reference")
    rows = frame.with_columns(change=change).sort(change.abs(), descending=True)
    missing = [pl.lit(None, pl.Float64).alias(name) for name in SINCE if name not in rows.columns]
    rows = rows.with_columns(missing)
    return Moved(info.name, policy.name, inputs["features"], policy.manifest["recipe"], rows)


def policy_changes(store: ExploredStore, cache: FeatureCache, name: str) -> pl.DataFrame:
    """How a policy's features differ from the reference's, whose cache it was trained with.

    Args:
        store: the store.
        cache: of the reference.
        name: of a policy (``policy/VERSION``, or its start) or of an evaluation of one.

    Returns:
        The audit of its newest evaluation with this cache, a row a feature and side that fires.

    Raises:
        NotThere: no evaluation of such a policy with this cache, or of several.
        NotReadable: it was made before audits were part of one.
    """
    found = [
        info
        for info in store.artifacts()
        if info.stage == "evaluation" and info.state == "complete"
        and _is_of(input_artifacts(info.inputs or {}), cache, name, info.name)
    ]  # fmt: skip
    if not found:
        raise NotThere(
            f"no evaluation of {name} with {cache.name}; `fpo run` with its recipe makes one"
        )
    policies = sorted({input_artifacts(one.inputs or {})["policy"] for one in found})
    if len(policies) > 1:
        raise NotThere(f"{name} may be any of {', '.join(policies)}: give more of its version")
    info = max(found, key=lambda one: one.created or "")
    artifact = store.store.artifact(info.stage, info.version)
    if WHOLE not in artifact.files:
        raise NotReadable(f"{info.name} has no audit: run its recipe again, or use `fpo audit`")
    return pl.read_parquet(artifact.path(WHOLE))


def _is_of(inputs: dict[str, str], cache: FeatureCache, name: str, evaluation: str) -> bool:
    mine = inputs.get("features") == cache.name
    return mine and (evaluation.startswith(name) or inputs.get("policy", "").startswith(name))
