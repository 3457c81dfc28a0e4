"""What training moved, feature by feature, on held-out pairs: from a run's evaluation."""

from typing import Any, NamedTuple

import polars as pl

from explorer.errors import NotReadable, NotThere
from explorer.store import ExploredStore
from storage.catalog import find_artifact
from storage.errors import ArtifactMissing
from storage.lineage import input_artifacts

TABLE = "features.parquet"


class Moved(NamedTuple):
    """Features by how far they moved."""

    evaluation: str
    policy: str
    cache: str  # the features artifact of the reference
    settings: dict[str, Any]  # of the training
    rows: pl.DataFrame  # feature, side, reference, policy, change, tokens; largest change first


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
    return Moved(info.name, policy.name, inputs["features"], policy.manifest["recipe"], rows)
