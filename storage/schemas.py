"""The Parquet tables: names, types and units. A public contract, documented in docs/tables.md.

``side`` is ``chosen`` or ``rejected``. A scored token is a response token outside the side's
unscored ranges; its ``position`` counts from 0 within the whole response. Feature activations are
in the SAE's own units.
"""

from collections.abc import Iterable, Mapping

import pyarrow as pa

# Raised when what a field means changes; a new field alone does not.
SCHEMA_VERSION = 1


def _field(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"description": description})


def _optional(name: str, kind: pa.DataType, description: str) -> pa.Field:
    return _field(name, kind, description).with_nullable(True)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


def _schema(table: str, *fields: pa.Field) -> pa.Schema:
    return pa.schema(fields, metadata={"table": table, "schema_version": str(SCHEMA_VERSION)})


_PAIR_ID = _field("pair_id", pa.string(), "16 hex digits derived from the pair's text")
_SIDE = _field("side", pa.string(), "chosen or rejected")
_EXAMPLES = _list(
    pa.struct(
        [
            _field("pair_id", pa.string(), "the pair"),
            _field("side", pa.string(), "chosen or rejected"),
            _field("position", pa.int32(), "token of the response, from 0"),
            _field("value", pa.float32(), "activation"),
        ]
    )
)

PAIRS = _schema(
    "pairs",
    _PAIR_ID,
    _field("prompt_ids", _list(pa.int32()), "token ids up to the opener of the answer"),
    _field("chosen_ids", _list(pa.int32()), "token ids of the answer, end of turn included"),
    _field("rejected_ids", _list(pa.int32()), "the same; empty in `instructions`"),
    _field("chosen_unscored", _list(pa.int32()), "ranges of `chosen_ids` that are not scored"),
    _field("rejected_unscored", _list(pa.int32()), "ranges of `rejected_ids` that are not scored"),
    _field("split", pa.string(), "train or heldout"),
    _field("source", pa.string(), "file and line it came from"),
)
# A field with this metadata is a metadata column: the recipe names it, the data gives its values.
_METADATA_ROLE = {b"role": b"metadata"}
_METADATA_TYPES = (pa.string(), pa.int64(), pa.float64(), pa.bool_())


def pairs_schema(metadata: Mapping[str, pa.DataType]) -> pa.Schema:
    """Return ``PAIRS`` followed by one nullable column per metadata name, flagged as metadata.

    Args:
        metadata: Type of each column: string, int64, float64 or bool. Null in a row means that the
            row does not have the field.
    """
    schema = PAIRS
    for name, kind in metadata.items():
        assert name not in PAIRS.names, f"metadata column {name} has the name of a fixed column"
        assert kind in _METADATA_TYPES, f"metadata column {name} has type {kind}"
        schema = schema.append(pa.field(name, kind, metadata=_METADATA_ROLE))
    return schema


def metadata_columns(schema: pa.Schema) -> list[str]:
    """Return the names of the metadata columns of a schema, also one read back from Parquet."""
    return list(metadata_types(schema))


def metadata_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return the type of each metadata column of a schema, by name."""
    role = _METADATA_ROLE.items()
    return {field.name: field.type for field in schema if role <= (field.metadata or {}).items()}


def names_beside(metadata: Iterable[str], columns: Iterable[str]) -> dict[str, str]:
    """Return a name for each metadata column in a table that has columns of its own.

    A name that the table uses itself becomes ``row_NAME``.
    """
    taken, found = set(columns), {}
    for name in metadata:
        found[name] = name
        while found[name] in taken:
            found[name] = f"row_{found[name]}"
        taken.add(found[name])
    return found


REFERENCE = _schema(
    "reference",
    _PAIR_ID,
    _field("chosen_logp", pa.float64(), "log-prob summed over scored tokens, nats"),
    _field("rejected_logp", pa.float64(), "log-prob summed over scored tokens, nats"),
    _field("chosen_tokens", pa.int32(), "scored tokens"),
    _field("rejected_tokens", pa.int32(), "scored tokens"),
)
FEATURES_POOLED = _schema(
    "features/pooled",
    _PAIR_ID,
    _SIDE,
    _field("n_tokens", pa.int32(), "scored tokens pooled over"),
    _field("indices", _list(pa.uint32()), "stored features, by descending value"),
    _field("values", _list(pa.float32()), "mean activation over scored tokens"),
    _field("nonzero", pa.int32(), "features with a positive mean"),
    _field("mass", pa.float32(), "sum of all means"),
    _field("cutoff", pa.float32(), "largest mean that is not stored; 0 when all are"),
    _field("pinned", _list(pa.uint32()), "features of the recipe's groups, ascending"),
    _field("pinned_values", _list(pa.float32()), "their means, whatever they are"),
)
FEATURES_TOKENS = _schema(
    "features/tokens",
    _PAIR_ID,
    _SIDE,
    _field("position", pa.int32(), "token of the response, from 0"),
    _field("token_id", pa.int32(), "the token at that position, predicted where it was read"),
    _field("indices", _list(pa.uint32()), "strongest features, by descending activation"),
    _field("values", _list(pa.float32()), "their activations"),
    _field("nonzero", pa.int32(), "active features"),
    _field("mass", pa.float32(), "sum of all activations"),
)
FEATURES_STATS = _schema(
    "features/stats",
    _field("feature", pa.uint32(), "index in the SAE"),
    _field("density", pa.float32(), "share of scored tokens where it is active"),
    _field("mean", pa.float32(), "mean activation over scored tokens"),
    _field("max", pa.float32(), "largest activation"),
    _field("mean_chosen", pa.float32(), "mean over chosen responses of the pooled value"),
    _field("mean_rejected", pa.float32(), "mean over rejected responses of the pooled value"),
    _field("examples", _EXAMPLES, "strongest tokens, by descending activation"),
)
FEATURES_SHARD_STATS = _schema(
    "features/shard_stats",
    _field("feature", pa.uint32(), "index in the SAE"),
    _field("tokens", pa.int64(), "scored tokens of the shard"),
    _field("responses_chosen", pa.int64(), "chosen responses of the shard"),
    _field("responses_rejected", pa.int64(), "rejected responses of the shard"),
    _field("active", pa.int64(), "scored tokens where it is active"),
    _field("total", pa.float64(), "sum of activations over scored tokens"),
    _field("max", pa.float32(), "largest activation"),
    _field("total_chosen", pa.float64(), "sum over chosen responses of the pooled value"),
    _field("total_rejected", pa.float64(), "sum over rejected responses of the pooled value"),
    _field("kept", pa.int64(), "scored tokens where it is among the strongest, which are stored"),
    _field("kept_total", pa.float64(), "sum of its activations there"),
    _field("pooled_active", pa.int64(), "responses whose mean is positive"),
    _field("pooled_kept", pa.int64(), "responses where its mean is stored"),
    _field("pooled_kept_total", pa.float64(), "sum of its means there"),
    _field("example_responses", _list(pa.uint32()), "row of `pooled` of the strongest tokens"),
    _field("example_positions", _list(pa.int32()), "token of the response, from 0"),
    _field("example_values", _list(pa.float32()), "their activations, descending"),
)
EVALUATION_BREAKDOWN = _schema(
    "evaluation/breakdown",
    _field("column", pa.string(), "metadata column of `pairs`"),
    _field("group", pa.string(), "the value, or the range of values"),
    _field("kind", pa.string(), "value, range, other (the rarest values) or null (no value)"),
    _field("values", pa.int32(), "distinct values in the group"),
    _field("pairs", pa.int32(), "held-out pairs in the group"),
    _field("metric", pa.string(), "as in `metrics.json`"),
    _optional("reference", pa.float64(), "the metric of the reference; null where undefined"),
    _optional("reference_low", pa.float64(), "lower end of its 95 % interval"),
    _optional("reference_high", pa.float64(), "upper end"),
    _field("policy", pa.float64(), "the metric of the policy"),
    _field("policy_low", pa.float64(), "lower end of its 95 % interval"),
    _field("policy_high", pa.float64(), "upper end"),
    _optional("difference", pa.float64(), "policy minus reference, paired; null where undefined"),
    _optional("difference_low", pa.float64(), "lower end of its 95 % interval"),
    _optional("difference_high", pa.float64(), "upper end"),
)
ANSWERS = _schema(
    "answers",
    _field("question_id", pa.string(), "of the benchmark, unique in its pack"),
    _field("turn", pa.int8(), "of the question, from 0"),
    _field("temperature", pa.float64(), "that it was sampled at; 0 is greedy"),
    _field("sample", pa.int32(), "number among the answers at this temperature, from 0"),
    _field("prompt_ids", _list(pa.int32()), "token ids up to the opener of the answer, or empty"),
    _field("answer_ids", _list(pa.int32()), "token ids, end of turn included, or empty"),
    _field("text", pa.string(), "without special tokens and white space at its ends"),
    _field("stop", pa.string(), "why it ends: `end of turn`, `length`, or an endpoint's word"),
    _field("tokens", pa.int32(), "sampled, end of turn included; 0 where an endpoint does not say"),
    _field("seed", pa.int64(), "its own, derived from the settings' and the first four fields"),
)
