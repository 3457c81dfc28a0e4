"""Dialogue and instruction rows -> answers to learn, each after the turns before it."""

from typing import Literal, NamedTuple

from fpo_core.data.conversations import hh
from fpo_core.data.conversations.fields import Fields
from fpo_core.data.conversations.messages import (
    parsed_messages,
    same_text,
    text_of,
    turns_of,
)
from fpo_core.data.conversations.model import ASSISTANT, USER, Turn
from fpo_core.data.conversations.preferences import check_order, check_turns, read_preferences
from fpo_core.data.conversations.prompts import (
    PROMPTS,
    read_prompt,
    read_tools,
    refuse_unsupported,
    with_system,
)
from fpo_core.data.conversations.sides import LABELS, NAMED, SWIFT
from fpo_core.data.drops import Unusable

Turns = Literal["last", "all"]

_DIALOGUES = ("messages", "conversations", "conversation")
_ANSWERS = ("completion", "output", "response", "answer")
# Labels of an answer that is not to be learnt, as KTO's data has them.
_UNDESIRABLE = (False, 0, "false", "False", "bad", "undesirable")


class Dialogue(NamedTuple):
    """A dialogue whose last turn is the assistant's."""

    turns: tuple[Turn, ...]
    tools: tuple[object, ...]
    first_answer: int  # place of the first turn that may be learnt


def read_dialogue(fields: Fields) -> Dialogue:
    """Read one row as a dialogue that ends with an answer.

    Of a preference pair, the chosen side is the dialogue.

    Raises:
        Unusable: the row is no dialogue, or one that cannot be learnt from.
    """
    if any(name in fields for names in NAMED for name in names) or any(
        all(name in fields for name in names) for names in SWIFT
    ):
        pair = read_preferences(fields)[0]
        return Dialogue((*pair.prompt, *pair.chosen), pair.tools, len(pair.prompt))
    refuse_unsupported(fields)
    tools = read_tools(fields)
    turns = _turns(fields)
    if any(fields.take(name) in _UNDESIRABLE for name in LABELS if name in fields):
        raise Unusable("undesirable")
    end = len(turns)
    while end and turns[end - 1].role != ASSISTANT:
        end -= 1
    if end == 0:
        raise Unusable("no_answer", "the dialogue has no answer to learn")
    if end < len(turns):
        fields.notes.add("trailing_turns")
    found = tuple(turns[:end])
    check_order(found)
    return Dialogue(found, tools, 0)


def answers_of(dialogue: Dialogue, turns: Turns) -> list[int]:
    """Return the places of the answers to learn.

    Args:
        dialogue: the dialogue.
        turns: `last`, or `all` of them.

    Raises:
        Unusable: no answer is to be learnt.
    """
    places = [
        place
        for place, turn in enumerate(dialogue.turns)
        if turn.role == ASSISTANT and turn.is_learnt and place >= dialogue.first_answer
    ]
    if not places:
        raise Unusable("undesirable", "every answer has the weight 0")
    return places[-1:] if turns == "last" else places


def check_answer(dialogue: Dialogue, place: int) -> None:
    """Raise for an answer that cannot be learnt.

    Raises:
        Unusable: the answer or a question before it is empty.
    """
    if not dialogue.turns[place].says_something:
        raise Unusable("empty", "the answer is empty")
    check_turns(dialogue.turns[:place])


def _turns(fields: Fields) -> list[Turn]:
    name = fields.first(_DIALOGUES)
    answer = fields.first(_ANSWERS)
    if name is not None:
        turns = turns_of(fields.take(name), f"{name!r}")
        _check_prompt(fields, turns)
        return with_system(fields, turns)
    if answer is None:
        raise Unusable("shape", _hint(fields))
    given = fields.take(answer)
    prompt = with_system(fields, read_prompt(fields))
    if not prompt:
        raise Unusable("shape", _hint(fields))
    if isinstance(given, (list, dict)):
        return [*prompt, *turns_of(given, f"{answer!r}")]
    said = Turn(ASSISTANT, text_of(given, f"{answer!r}"))
    spaced = any(hh.spaces_answers(fields.peek(name)) for name in PROMPTS)
    return [*prompt, hh.unspaced(said) if spaced else said]


def _check_prompt(fields: Fields, turns: list[Turn]) -> None:
    """Raise where a row's `prompt` is not a question of its dialogue, as UltraChat repeats it."""
    prompt = fields.take("prompt")
    if isinstance(prompt, str) and parsed_messages(prompt) is None:
        given = [prompt]
    else:
        messages = [] if prompt is None else turns_of(prompt, "'prompt'")
        given = [turn.content for turn in messages if turn.role == USER]
    asked = [turn.content for turn in turns if turn.role == USER]
    for text in filter(str.strip, given):
        if not any(same_text(text, question) for question in asked):
            raise Unusable("prompt_mismatch", "`prompt` is none of the dialogue's questions")


def _hint(fields: Fields) -> str:
    have = ", ".join(map(repr, fields.names)) or "no fields with a value"
    return (
        f"the row has no dialogue and no answer. It has {have}. Expected `messages`, "
        f"`conversations`, or a prompt with an answer; else set sft.columns={{prompt: ..., "
        f"completion: ...}}"
    )
