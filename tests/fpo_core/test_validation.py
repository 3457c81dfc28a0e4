"""Every setting of a recipe, given a value it cannot take, is refused in this project's words."""

import re
import types
from typing import Annotated, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from fpo_core.errors import RecipeError
from fpo_core.recipe import Recipe, load_recipe
from fpo_core.recipe.sweep import load_preset

# What pydantic says by itself, and the names of its and our classes.
STOCK = re.compile(
    r"Input should|\bvalid (?!in\b)|instance of|pydantic|type=|Extra inputs|Field required"
    r"|should|Value error|ensure this|Settings\b|constrained|literal\[|NoneType|another value"
)
WRONG = [
    "fast",
    "",
    "x" * 300,
    -1,
    0,
    1.5,
    2**70,
    10**400,
    float("inf"),
    float("nan"),
    True,
    None,
    [],
    [-1],
    [[1]],
    ["fast", {"no_such": 1}],
    {},
    {"no_such": 1},
    {"constant": [1]},
    {1: 2},
    "2024-13-01",
    b"\xff",
]
# Enough of each optional section that its settings exist.
SECTIONS = {
    "sft": {"data": "x.jsonl"},
    "judge": {"model": "m", "price": {"prompt": 1, "reply": 1}},
    "resources": {"pools": {}},
    "benchmarks": [{"pack": "mt-bench"}],
}
BASE = {
    "name": "small",
    "model": {"source": "./model"},
    "data": {"train": ["x.jsonl"], "heldout": ["y.jsonl"]},
    "sae": {"source": "./sae", "layer": 1},
}


def models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in models_in(part)}


def is_list(annotation):
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(is_list(part) for part in get_args(annotation))
    return get_origin(annotation) is tuple


def fields_of(model, place=()):
    """Paths of all fields, of those in lists by the index 0."""
    for name, field in model.model_fields.items():
        path = (*place, name)
        yield path
        for inner in models_in(field.annotation):
            yield from fields_of(inner, (*path, 0) if is_list(field.annotation) else path)


def with_value(path, value):
    """The recipe with one setting; a list on the way has one element."""
    values = {**BASE, **SECTIONS}

    def put(old, rest):
        if not rest:
            return value
        if rest[0] == 0:
            first = old[0] if isinstance(old, list) and old and isinstance(old[0], dict) else {}
            return [put(first, rest[1:])]
        old = old if isinstance(old, dict) else {}
        return {**old, rest[0]: put(old.get(rest[0]), rest[1:])}

    return put(values, path)


FIELDS = sorted(set(fields_of(Recipe)), key=str)


def name_of(path):
    return ".".join(map(str, path))


def refusal(path, name, given):
    try:
        load_recipe(name, given)
    except RecipeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("section", sorted(Recipe.model_fields))
def test_every_wrong_value_is_refused_in_our_words(tmp_path, section):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(BASE))
    refused = 0
    for path in (field for field in FIELDS if field[0] == section):
        for value in WRONG:
            whole = with_value(path, value)
            told = refusal(path, str(file), {section: whole[section]})
            if told is None:
                continue
            refused += 1
            where = f"{name_of(path)}={str(value)[:40]}"
            assert not STOCK.search(told.replace(repr(str(value)), "")), f"{where}: {told}"
            # A fault of several settings together may name the other one.
            assert any(str(part) in told for part in path[-2:]), f"{where}: {told}"
            assert len(told) < 1500, where
    assert refused


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.lr=fast", "train.lr: expected a number, but got 'fast'"),
        ("train.k=1.5", "train.k: expected a whole number, but got 1.5"),
        ("train=5", "train: expected a mapping of keys to values, but got 5"),
        ("train.pooled=perhaps", "train.pooled: expected true or false, but got 'perhaps'"),
        ("data.metadata=5", "data.metadata: expected a list, but got 5"),
        ("data.system=dorp", "expected 'fold', 'drop' or 'refuse', but got 'dorp'; did you mean"),
        ("features.cache_k=most", "features.cache_k: expected a whole number or 'all', but got"),
        ("data.truncate_answers=x", "data.truncate_answers: expected true or false or 'with_end'"),
        ("data.columns.prompt=5", "data.columns.prompt: expected text or a mapping of keys"),
        (
            "data.columns.prompt={constnt: x}",
            "unknown key 'data.columns.prompt.constnt'; did you mean 'constant'?",
        ),
        ("data.train=[{pth: x}]", "unknown key 'data.train.0.pth'; did you mean 'path'?"),
        ("train.groups=[{name: a, features: [-1]}]", "train.groups.0.features.0: expected a num"),
    ],
)
def test_a_wrong_value_is_told_as_expected_and_given(tmp_path, setting, told):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(BASE))
    message = refusal((), str(file), [setting])
    key, _, text = setting.partition("=")
    inner = yaml.safe_load(text)
    for part in reversed(key.split(".")):
        inner = {part: inner}
    merged = (
        BASE | {top: BASE.get(top, {}) | values for top, values in inner.items()}
        if ("." in key)
        else BASE | inner
    )
    file.write_text(yaml.safe_dump(merged))
    assert told in message
    assert refusal((), str(file), ()) == message  # in the file: the same words


@pytest.mark.parametrize("key", ["base_url", "key_env"])
def test_what_may_be_a_secret_is_not_repeated(tmp_path, key):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(BASE))
    address = "http://me:sk-12345@host/v1"
    for value in (address, [address], {address: 1}):
        message = refusal((), str(file), {f"generation.{key}": value})
        assert key in message
        assert "sk-12345" not in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("titel: x\ngrid: {train.alpha: [1]}", "unknown key 'titel'; did you mean 'title'?"),
        ("title: x\ngrid: {train.alpha: 1}", "grid.train.alpha: expected a list, but got 1"),
        ("title: x\ncells: [{name: a, set: 5}]", "cells.0.set: expected a mapping of keys"),
        ("title: x", "give a grid, or cells"),
        ("[1]", "expected a mapping of keys to values, but got a list of 1"),
    ],
)
def test_a_sweeps_file_is_refused_in_the_same_words(tmp_path, text, told):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=re.escape(told)) as caught:
        load_preset(str(file))
    assert not STOCK.search(str(caught.value))
