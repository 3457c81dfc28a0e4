"""The fields of a row, with a record of which were used; column mappings from the recipe."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fpo_core.data.conversations.messages import MESSAGE_KEYS, ROLE_KEYS, is_absent
from fpo_core.data.drops import Unusable


class Fields:
    """The fields of one row that have a value.

    A null or an empty list means that the row does not have the field: Arrow fills them in. Names
    are found whatever their case, an exact match first.

    Args:
        row: the row as it was read.
        hidden: names that are not to be found; they count as unused.

    Attributes:
        notes: things to report about the row, keys of `NOTES`.
        used_inside: of a column of objects, the keys that were used.
        unused_inside: paths within columns that were not used.
    """

    def __init__(self, row: Mapping[str, Any], hidden: Collection[str] = ()) -> None:
        present = {key: value for key, value in row.items() if not is_absent(value)}
        lower = {key.strip().lower(): key for key in reversed(present)}
        keys = {**lower, **{key: key for key in present}}
        self._keys = {name: key for name, key in keys.items() if name not in hidden}
        self._present = present
        self._used: dict[str, None] = {}
        self.used_inside: dict[str, set[str]] = {}
        self.unused_inside: list[str] = []
        self.notes: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    @property
    def names(self) -> list[str]:
        """Return the names of all fields with a value."""
        return list(self._present)

    @property
    def unused(self) -> list[str]:
        """Return the names of the fields that nobody took, and of such keys of messages."""
        columns = [name for name in self._present if name not in self._used]
        keys = (
            f"{name}[].{key}"
            for name in self._used
            if isinstance(self._present[name], list)
            for key in _unused_keys(self._present[name], self.used_inside.get(name))
        )
        return [*columns, *self.unused_inside, *dict.fromkeys(keys)]

    def peek(self, name: str) -> Any:
        """Return a field's value without using it; None where the row does not have it."""
        key = self._keys.get(name)
        return None if key is None else self._present[key]

    def take(self, name: str) -> Any:
        """Use a field and return its value; None where the row does not have it."""
        key = self._keys.get(name)
        if key is None:
            return None
        self._used[key] = None
        return self._present[key]

    def first(self, names: Sequence[str]) -> str | None:
        """Return the first of some names that the row has."""
        return next((name for name in names if name in self), None)


NOTES: dict[str, str] = {
    "json_text": "messages stored as JSON text were parsed",
    "several_turns": "a side has several turns; other speakers' turns in it are not scored",
    "sides_part_early": "the sides part before their last turn and are trained on from there",
    "trailing_turns": "turns after the last answer were left out; nothing after it is scored",
    "prefilled": "the prompt ends in a partial answer that both sides continue",
    "scores_reversed": "score_chosen is below score_rejected; the row's own order is kept",
    "scores_tied": "score_chosen equals score_rejected",
    "repeats_prompt": "both sides begin with the prompt's text and are trained on as written",
    "special_tokens": "a text contains special tokens, which become control tokens",
    "doubled_end": "an answer's text ends with the end of turn, which is then there twice",
    "folded": "the system prompt was folded into the first user turn (data.system=fold)",
    "answer_shortened": "the chat template changes an answer's text",
    "earlier_shortened": "the chat template leaves out part of an earlier answer, as its thoughts",
    "names_left_out": "the chat template does not render a turn's `name` or `tool_call_id`",
    "role_markers": "a text contains another format's role markers and is read as one turn",
    "opener": "the generation prompt is no prefix of an answered conversation; answers follow the "
    "assistant's plain opener",
    "prompt_cut": "the prompt was cut (data.truncation)",
    "answer_cut": "an answer was cut (data.truncate_answers)",
}


# Fields that no row can do without, once a mapping names them.
_NEEDED = ("prompt", "chosen", "rejected", "messages", "completion")


def mapped_row(row: Mapping[str, Any], columns: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a row with its fields where the recipe says they are.

    Args:
        row: the row as it was read.
        columns: field -> path (`answers.0.text`) or an object with a `constant`; None leaves the
            row as it is.

    Raises:
        Unusable: a path leads nowhere in this row.
    """
    if not columns:
        return dict(row)
    taken: set[str] = set()
    paths: set[str] = set()
    fields: dict[str, Any] = {}
    for field, path in columns.items():
        constant = getattr(path, "constant", None)
        fields[field] = constant if constant is not None else value_at(row, path, field)
        if field in _NEEDED and is_absent(fields[field]):
            raise Unusable("missing_field", f"data.columns.{field}={path}: it is null in this row")
        if constant is None:
            taken.add(path if path in row else path.partition(".")[0])
            paths.add(path)
    rest = {key: value for key, value in row.items() if key not in taken and key not in fields}
    inner = {
        f"{name}.{key}": value
        for name in taken - paths
        for key, value in _parts(row[name])
        if not any(f"{path}.".startswith(f"{name}.{key}.") for path in paths)
    }
    return {**rest, **inner, **fields}


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of an object; those of a list are the choice of the mapping."""
    return iter(value.items() if isinstance(value, Mapping) else ())


def value_at(row: Mapping[str, Any], path: str, field: str) -> Any:
    """Return the value that a path such as `answers.0.text` leads to.

    Raises:
        Unusable: naming the part of the path that the row does not have.
    """
    if path in row:
        return row[path]
    value: Any = row
    walked: list[str] = []
    for part in path.split("."):
        walked.append(part)
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif _is_list(value) and _is_index(part) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            have = ", ".join(map(repr, row)) or "no columns"
            raise Unusable(
                "missing_field",
                f"data.columns.{field}={path}: the row has no {'.'.join(walked)!r}. It has {have}",
            )
    return value


def _unused_keys(messages: list[Any], used: Collection[str] | None) -> Iterator[str]:
    for message in messages:
        if used is not None:  # no message, but an answer with its judgment
            yield from (key for key, value in message.items() if not _is_used(key, value, used))
            continue
        if type(message) is dict and message.keys() <= MESSAGE_KEYS:
            continue
        if isinstance(message, Mapping) and any(message.get(key) for key in ROLE_KEYS):
            for key, value in message.items():
                if not _is_used(key, value, MESSAGE_KEYS):
                    yield key


def _is_used(key: str, value: Any, used: Collection[str]) -> bool:
    return key in used or is_absent(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_index(part: str) -> bool:
    return part.removeprefix("-").isdigit()
