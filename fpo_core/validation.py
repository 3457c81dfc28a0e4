"""Report what pydantic refuses in this project's words: expected X, but got Y."""

import difflib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

# By pydantic's error type; the numbers are of its `ctx`.
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of keys to values",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "a number greater than {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number with fewer digits",
    "int_type": "a whole number",
    "invalid_key": "a key that is text",
    "json_invalid": "JSON",
    "less_than": "a number less than {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "text of at most {max_length} characters",
    "string_too_short": "text of at least {min_length} characters",
    "string_type": "text",
    "string_unicode": "UTF-8 text",
    "too_long": "a list of at most {max_length}",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
# What pydantic adds to a key for an alternative of a union; no part of the key.
_TAG = re.compile(r"<\w+>|Constant|constrained-\w+|literal\[.*\]|\[key\]")
_TYPE_TAG = re.compile(r"bool|int|float|str")  # a column could have such a name: only at the end
# A mapping is none: its keys are the user's own, and `a.b` then no key of the recipe.
_HOLDERS = (Union, types.UnionType, tuple, list)
# Someone pastes a key or a password into these, which a log must not show.
_PRIVATE = ("base_url", "key_env")


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """Describe every fault of an error: the key, what was expected and what was given.

    Args:
        error: as pydantic raised it.
        schema: the model that was validated; an unknown key is compared with its keys.
    """
    lines: list[str] = []
    expected: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for fault in error.errors():
        place = _place(fault["loc"])
        key = ".".join(place)
        if fault["type"] == "extra_forbidden":
            lines.append(_unknown(place, schema))
        elif fault["type"] == "missing":
            lines.append(f"{key!r} is missing and has no default")
        elif fault["type"] == "value_error":  # a validator of ours
            reason = fault["msg"].removeprefix("Value error, ")
            lines.append(_at(key, reason + _parenthesis(place, fault["input"])))
        else:
            # A union's alternatives each have a fault: one line for all.
            expected.setdefault(key, []).append(_expectation(fault))
            given.setdefault(key, _got(place, fault["input"], fault["type"], fault.get("ctx", {})))
    within = [".".join(_place(fault["loc"])) for fault in error.errors()]
    for key, alternatives in expected.items():
        # One alternative was understood, up to a fault within it.
        if len(within) > 1 and key and any(inner.startswith(f"{key}.") for inner in within):
            continue
        lines.append(_at(key, f"expected {' or '.join(dict.fromkeys(alternatives))}{given[key]}"))
    return "; ".join(lines)


def valid_keys(place: list[str], schema: type[BaseModel]) -> list[str]:
    """Return the keys of the section at ``place`` (a list of section names), sorted."""
    model = schema
    for part in place:
        # What is no key is an index in a list, or a key of a mapping.
        if field := model.model_fields.get(part):
            model = _section(field.annotation, (*_HOLDERS, dict)) or model
    return sorted(model.model_fields)


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Yield every key of a model as ``section.key``, in the order of its fields."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := _section(field.annotation):
            yield from all_keys(section, f"{prefix}{name}.")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``; did you mean 'WORD'?`` for the choice like it, a full stop if there is none."""
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else "."


def _at(key: str, reason: str) -> str:
    return f"{key}: {reason}" if key else reason


def _place(loc: tuple[int | str, ...]) -> list[str]:
    parts = [str(part) for part in loc]
    if parts and _TYPE_TAG.fullmatch(parts[-1]):
        parts.pop()
    return [part for part in parts if not _TAG.fullmatch(part)]


def _expectation(fault: Mapping[str, Any]) -> str:
    # A type that no model here has raised so far still gets a sentence of ours.
    return _EXPECTED.get(fault["type"], "another value").format(**fault.get("ctx", {}))


def _got(place: list[str], value: Any, kind: str, context: Mapping[str, Any]) -> str:
    if kind == "json_invalid" or (place and place[-1] in _PRIVATE):
        return ""
    got = f", but got {_shown(value)}"
    if kind != "literal_error" or not isinstance(value, str):
        return got
    hint = nearest(value, re.findall(r"'([^']*)'", context["expected"]))
    return got + hint.removesuffix(".")


def _parenthesis(place: list[str], value: Any) -> str:
    private = isinstance(value, dict) or (place and place[-1] in _PRIVATE)
    return "" if private else f" (given: {_shown(value)})"


def _shown(value: Any) -> str:
    """Write a value as YAML has it; of a mapping or list only that it is one."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the largest
        return "a number of over 77 digits"
    text = repr(value) if isinstance(value, (str, bytes)) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unknown(place: list[str], schema: type[BaseModel]) -> str:
    *section, word = place
    allowed = valid_keys(section, schema)
    known = difflib.get_close_matches(word, allowed, n=1)
    near = nearest(word, allowed) if known else _nearest_anywhere(word, schema)
    where = f" in {'.'.join(section)!r}" if section else ""
    return f"unknown key {'.'.join(place)!r}{near} Valid{where}: {', '.join(allowed)}"


def _nearest_anywhere(word: str, schema: type[BaseModel]) -> str:
    """Return a key of that name in another section: ``alpha`` at the top means ``train.alpha``."""
    same = [key for key in all_keys(schema) if key.rpartition(".")[2] == word]
    return f"; did you mean {same[0]!r}?" if same else "."


def _section(annotation: Any, holders: tuple[Any, ...] = _HOLDERS) -> type[BaseModel] | None:
    """Return the model that an annotation has in it, the first one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in holders:
        sections = (_section(part, holders) for part in get_args(annotation))
        return next(filter(None, sections), None)
    # Annotated[X, ...]: its metadata is no model.
    return _section(annotation.__origin__, holders) if hasattr(annotation, "__metadata__") else None
