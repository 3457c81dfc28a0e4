"""Small artifacts of the ``reference`` schema, made through the writer as a stage does."""

from collections.abc import Iterable, Mapping

import pyarrow as pa

from storage import schemas
from storage.artifact import Artifact
from storage.manifest import Made
from storage.store import Store
from storage.version import artifact_version

INPUTS = {"pairs": "0123456789abcdef"}


def rows(start: int, count: int = 3) -> pa.Table:
    """A shard; ``start`` numbers its pairs."""
    values = [float(n) for n in range(start, start + count)]
    return pa.table(
        {
            "pair_id": [f"{n:016x}" for n in range(start, start + count)],
            "chosen_logp": values, "rejected_logp": values,
            "chosen_tokens": [1] * count, "rejected_tokens": [2] * count,
        },
        schema=schemas.REFERENCE,
    )  # fmt: skip


def made(recipe: Mapping[str, object], inputs: Mapping[str, str] = INPUTS, **stats: object) -> Made:
    """What a stage says of its artifact."""
    return Made(1, recipe, inputs, stats, 1.0, {})


def version_of(
    recipe: Mapping[str, object], inputs: Mapping[str, str] = INPUTS, stage: str = "reference"
) -> str:
    """The version of an artifact made so."""
    return artifact_version(stage=stage, schema_version=1, recipe=recipe, inputs=inputs)


RECIPE = {"dtype": "float32"}
VERSION = version_of(RECIPE)


def make(
    store: Store,
    recipe: Mapping[str, object] = RECIPE,
    inputs: Mapping[str, str] = INPUTS,
    stage: str = "reference",
    shards: Iterable[int] = range(2),
) -> Artifact:
    """A finished artifact of small shards."""
    version = version_of(recipe, inputs, stage)
    with store.hold(stage, version, None) as hold:
        assert hold is not None
        writer = store.writer(stage, version, hold)
        for shard in shards:
            writer.put_shard(shard, {"": rows(3 * shard)})
        return writer.commit(made(recipe, inputs, answer=42))
