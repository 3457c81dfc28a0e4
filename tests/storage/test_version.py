"""Artifact versions: one address for equal content, computable by any program."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.version import artifact_version, canonical_json

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.text()
    | st.floats(allow_nan=False, allow_infinity=False)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def test_a_version_is_what_the_documented_recipe_gives():
    """Computed here by hand, as another program would: docs/storage.md describes it."""
    text = (
        '{"inputs":{"model":"gguf:ab:v1"},"recipe":{"lr":1e-05,"name":"é"},'
        '"schema_version":3,"stage":"pairs"}'
    )
    expected = hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
    found = artifact_version(
        stage="pairs", schema_version=3, recipe={"name": "é", "lr": 1e-5},
        inputs={"model": "gguf:ab:v1"},
    )  # fmt: skip
    assert found == expected == "3aed21b6cc74618a"


@given(st.dictionaries(st.text(), VALUES), st.randoms(use_true_random=False))
def test_order_of_keys_does_not_matter_and_nothing_is_lost(value, random):
    keys = list(value)
    random.shuffle(keys)
    text = canonical_json(value)
    assert canonical_json({key: value[key] for key in keys}) == text
    assert json.loads(text) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"a": -float("inf")}]])
def test_numbers_that_json_has_not_are_refused(value):
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(value)


def test_keys_that_are_not_strings_are_refused():
    with pytest.raises(TypeError, match="string keys, this one is 1"):
        canonical_json({"layers": [{1: "a"}]})
