"""Read a source's rows as conversations, with a survey of what the rows were like."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fpo_core.data.conversations.dialogues import Turns, answers_of, check_answer, read_dialogue
from fpo_core.data.conversations.fields import Fields, mapped_row
from fpo_core.data.conversations.messages import is_absent
from fpo_core.data.conversations.model import Conversation
from fpo_core.data.conversations.preferences import read_preferences
from fpo_core.data.conversations.prompts import PROMPTS, SUPPLEMENTS
from fpo_core.data.drops import DroppedPair, Unusable
from fpo_core.data.sources.identity import Resolved
from fpo_core.data.sources.row import Row
from fpo_core.data.sources.rows import read_rows

Found = Iterator[Conversation | DroppedPair]


PASSED_OVER: dict[str, str] = {
    "weight": "not picked (the source's weight)",
    "other_split": "of the other split (data.heldout.fraction)",
}


@dataclass
class Survey:
    """What the rows of a source were like.

    Attributes:
        rows: how many were read.
        shapes: rows by the columns they used.
        unused: rows by each column that nothing used.
        notes: rows by each note, keys of `NOTES`.
        dropped: rows and answers by reason.
        passed_over: sound examples that this split does not take, by why, keys of `PASSED_OVER`.
    """

    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """Return the survey as plain values, for a manifest."""
        return {
            "rows": self.rows,
            "shapes": dict(self.shapes),
            "unused_columns": dict(self.unused),
            "notes": dict(self.notes),
            "dropped": dict(self.dropped),
            "passed_over": dict(self.passed_over),
        }


@dataclass(frozen=True)
class Reading:
    """How rows become conversations.

    Attributes:
        columns: the recipe's column mapping.
        metadata: columns that stay with each conversation.
        pairs_per_prompt: most pairs of a ranking.
        turns: for dialogues, the answers to learn; None reads preference pairs.
    """

    columns: Mapping[str, Any] | None = None
    metadata: Sequence[str] = ()
    pairs_per_prompt: int = 1
    turns: Turns | None = None

    @property
    def hidden(self) -> frozenset[str]:
        """Return the columns that cannot be the prompt, since the mapping names another."""
        mapped = {*(self.columns or {})}
        others = {*PROMPTS, *SUPPLEMENTS} - mapped
        return frozenset(others) if mapped & {*PROMPTS} else frozenset()


def read_conversations(rows: Iterator[Row], reading: Reading, survey: Survey) -> Found:
    """Read rows as conversations; a row that cannot be used is dropped, never changed.

    Args:
        rows: of one source.
        reading: how.
        survey: is filled in as rows are read.

    Yields:
        Conversations, and what was dropped with its reason.
    """
    read = _pairs if reading.turns is None else _answers
    for row in rows:
        survey.rows += 1
        try:
            if row.fault is not None:
                raise Unusable(row.fault.reason, row.fault.detail)
            yield from _read_row(row, reading, survey, read)
        except Unusable as unusable:
            yield _dropped(row, unusable, survey)


def read_source(
    path: str,
    resolved: Resolved | None = None,
    reading: Reading | None = None,
    survey: Survey | None = None,
) -> Found:
    """Read one source as conversations; see `read_conversations`.

    Args:
        path: file, folder, hub split or address.
        resolved: the files of a source that is not local.
        reading: how rows become conversations; preference pairs by default.
        survey: is filled in as rows are read.
    """
    return read_conversations(read_rows(path, resolved), reading or Reading(), survey or Survey())


def _read_row(
    row: Row,
    reading: Reading,
    survey: Survey,
    read: Callable[[Fields, Row, Reading, Survey], Found],
) -> Found:
    fields = Fields(mapped_row(row.value, reading.columns), reading.hidden)
    metadata = {name: metadata_value(row.value, name) for name in reading.metadata}
    every = list(read(fields, row, reading, survey))
    # Only now is it known what of the row was used.
    kept = {part for name in reading.metadata for part in (name, name.partition(".")[0])}
    unused = [name for name in fields.unused if name not in kept]
    survey.unused.update(unused)
    survey.shapes[_shape(fields)] += 1
    survey.notes.update(fields.notes)
    for found in every:
        if isinstance(found, Conversation):
            found = found._replace(metadata=metadata)
        yield found


def _pairs(fields: Fields, row: Row, reading: Reading, survey: Survey) -> Found:
    del survey
    for pair in read_preferences(fields, reading.pairs_per_prompt):
        yield Conversation(
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            where=row.where,
            tools=pair.tools,
        )


def _answers(fields: Fields, row: Row, reading: Reading, survey: Survey) -> Found:
    dialogue = read_dialogue(fields)
    assert reading.turns is not None
    for place in answers_of(dialogue, reading.turns):
        try:
            check_answer(dialogue, place)
        except Unusable as unusable:
            yield _dropped(row, unusable, survey)
            continue
        yield Conversation(
            prompt=dialogue.turns[:place],
            chosen=dialogue.turns[place : place + 1],
            rejected=None,
            where=row.where,
            tools=dialogue.tools,
        )


def _dropped(row: Row, unusable: Unusable, survey: Survey) -> DroppedPair:
    survey.dropped[unusable.reason] += 1
    return DroppedPair("", unusable.reason, row.where, unusable.detail)


def _shape(fields: Fields) -> str:
    used = {*fields.names} - {*fields.unused}
    return ", ".join(name for name in fields.names if name in used)


def metadata_value(row: Mapping[str, Any], name: str) -> Any:
    """Return a metadata column's value; a path such as `meta.topic` reaches into objects."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or is_absent(value.get(part)):
            return None
        value = value[part]
    return value
