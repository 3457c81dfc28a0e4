"""The prompt of a row, from whichever columns hold it, with system prompt, history and tools."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_core.data.conversations import hh
from fpo_core.data.conversations.fields import Fields
from fpo_core.data.conversations.messages import (
    MEDIA_KEYS,
    objects_of,
    parsed_messages,
    same_text,
    text_of,
    turns_of,
)
from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Turn
from fpo_core.data.drops import Unusable

# Columns that hold a prompt by themselves.
PROMPTS = (
    "prompt",
    "instruction",
    "question",
    "query",
    "conversations",
    "conversation",
    "messages",
)
# Columns that add to an instruction, as in Alpaca and Dolly; they serve alone, too.
SUPPLEMENTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "system_message", "system_instruction", "sys")
# Columns that change what a model reads or writes, and that nothing here can render.
_UNSUPPORTED = ("documents", "chat_template_kwargs", "functions", "initial_reason_steps")


def refuse_unsupported(fields: Fields) -> None:
    """Raise for a row whose meaning depends on something that cannot be rendered.

    Raises:
        Unusable: naming the column.
    """
    media = next((name for name in MEDIA_KEYS if _is_there(fields, name)), None)
    if media:
        raise Unusable("images", f"the row has {media!r}, this pipeline reads text only")
    other = next((name for name in _UNSUPPORTED if _is_there(fields, name)), None)
    if other:
        raise Unusable("unsupported", f"the row has {other!r}, which cannot be rendered")


def _is_there(fields: Fields, name: str) -> bool:
    """Return whether a row has a column with something in it; CSV files fill in empty texts."""
    value = fields.peek(name)
    if isinstance(value, str) and value.strip() in ("", "[]", "{}"):
        fields.take(name)
        return False
    return name in fields


def read_tools(fields: Fields) -> tuple[Any, ...]:
    """Return the row's tools, which may be JSON text.

    Raises:
        Unusable: the value is no list of tools.
    """
    tools = fields.take("tools")
    if tools is None or (isinstance(tools, str) and not tools.strip()):
        return ()
    found = objects_of(tools)
    if found is None:
        raise Unusable("unsupported", "`tools` is not a list of tool descriptions")
    return tuple(found)


def read_prompt(fields: Fields, names: Sequence[str] = PROMPTS) -> list[Turn]:
    """Return the turns of the row's prompt, without its system prompt and history.

    Args:
        fields: the row.
        names: the columns that may hold it.

    Returns:
        The turns; none where the row has no such column (the sides then carry the prompt).

    Raises:
        Unusable: several columns hold different prompts, or a column is not readable.
    """
    found = [name for name in names if name in fields]
    if not found:
        alone = fields.first(SUPPLEMENTS)
        return _turns(fields, alone) if alone else []
    readings = [_turns(fields, name) for name in found]
    longest = max(readings, key=len)
    for name, turns in zip(found, readings, strict=True):
        if not _is_part(turns, longest):
            other = found[readings.index(longest)]
            raise Unusable(
                "ambiguous",
                f"both {name!r} and {other!r} could be the prompt. Set data.columns.prompt",
            )
    return _with_supplements(fields, longest)


def with_system(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """Return turns with the row's system prompt and its history before them.

    Raises:
        Unusable: the turns have another system prompt, or the history is not readable.
    """
    turns = _with_history(fields, turns)
    found = {name: text_of(fields.take(name), f"{name!r}") for name in SYSTEMS if name in fields}
    found = {name: text for name, text in found.items() if text.strip()}
    if not found:
        return turns
    name, given = next(iter(found.items()))
    other = next((other for other, text in found.items() if not same_text(text, given)), None)
    if other:
        raise Unusable("two_systems", f"the columns {name!r} and {other!r} differ")
    if turns and turns[0].role == SYSTEM:
        if same_text(turns[0].content, given):
            return turns
        raise Unusable("two_systems", f"the turns' system prompt differs from the column {name!r}")
    return [Turn(SYSTEM, given), *turns]


def _turns(fields: Fields, name: str) -> list[Turn]:
    value = fields.take(name)
    if isinstance(value, str):
        if hh.is_dialogue(value):
            return hh.prompt_turns(value)
        parsed = parsed_messages(value)
        if parsed is None:
            if hh.has_other_markers(value):
                fields.notes.add("role_markers")
            return [Turn(USER, value)]
        fields.notes.add("json_text")
        return turns_of(parsed, f"{name!r}")
    if isinstance(value, (int, float)):
        raise Unusable("not_text", f"{name!r} is a number, expected text or messages")
    return turns_of(value, f"{name!r}")


def _with_supplements(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """Add Alpaca's `input`, or Dolly's `context`, to a prompt of one text."""
    for name in SUPPLEMENTS:
        if not isinstance(fields.peek(name), str):
            continue
        if not fields.peek(name).strip():
            fields.take(name)
        elif len(turns) == 1 and fields.first(("instruction", "question")):
            parts = [turns[0].content, fields.take(name)]
            content = "\n\n".join(part for part in parts if part.strip())
            turns = [turns[0]._replace(content=content)]
        else:
            raise Unusable(
                "ambiguous", f"it is not known how {name!r} adds to the prompt. Set data.columns"
            )
    return turns


def _with_history(fields: Fields, turns: list[Turn]) -> list[Turn]:
    """Put the earlier rounds of Alpaca's `history` before a prompt."""
    history = fields.take("history")
    if isinstance(history, str):
        if not turns and history.strip() and not history.lstrip().startswith("[["):
            return [Turn(USER, history)]  # SHP names its prompt so
        history = _parsed(history)
    if history is None:
        return turns
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise Unusable("unsupported", "`history` is not a list of rounds or messages")
    earlier: list[Turn] = []
    for each in history:
        if isinstance(each, Mapping):
            earlier += turns_of([each], "`history`")
        elif _is_round(each):
            asked, answered = (text_of(text, "`history`") for text in each)
            earlier += [Turn(USER, asked), Turn(ASSISTANT, answered)]
        else:
            raise Unusable("unsupported", "a round of `history` is not a question and an answer")
    system = [turn for turn in turns[:1] if turn.role == SYSTEM]
    return [*system, *earlier, *turns[len(system) :]]


def _parsed(text: str) -> Any:
    """Return JSON from a text; None for an empty one, the text itself where it is no JSON."""
    if not text.strip():
        return None
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return text


def _is_round(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def _is_part(turns: list[Turn], longest: list[Turn]) -> bool:
    """Return whether one reading of the prompt says nothing that the longest does not."""
    said = [(turn.role, turn.content) for turn in turns]
    whole = [(turn.role, turn.content) for turn in longest]
    return any(whole[start : start + len(said)] == said for start in range(len(whole)))
