"""The address of an artifact: a hash of what produced it.

Canonical JSON: keys sorted, no white space, UTF-8 unescaped, floats in Python's shortest form,
no NaN or infinity. ``artifact_version`` is the first 16 hex digits of sha256 over the canonical
JSON of ``{"inputs", "recipe", "schema_version", "stage"}``, so that any program can compute it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

VERSION_DIGITS = 16


def canonical_json(value: Any) -> bytes:
    """One byte string for every equal JSON value.

    Raises:
        ValueError: NaN or infinity.
        TypeError: a value that JSON has not, or a key that is not a string.
    """
    _check_keys(value)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def artifact_version(
    *, stage: str, schema_version: int, recipe: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """The version of a stage's artifact.

    Args:
        stage: the artifact's name, such as ``pairs``.
        schema_version: raised when the stage's code changes what it writes.
        recipe: the part of the recipe that changes the result.
        inputs: content identities or versions of what it is made from.
    """
    content = {
        "stage": stage,
        "schema_version": schema_version,
        "recipe": dict(recipe),
        "inputs": dict(inputs),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()[:VERSION_DIGITS]


def _check_keys(value: Any) -> None:
    # json.dumps would turn the keys 1 and "1" into the same text.
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON has string keys, this one is {key!r}")
            _check_keys(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(inner)
