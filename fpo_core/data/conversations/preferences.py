"""Preference rows -> conversations: the shared beginning is the prompt, the rest is compared."""

from typing import Any, NamedTuple

from fpo_core.data.conversations import hh
from fpo_core.data.conversations.fields import Fields
from fpo_core.data.conversations.messages import (
    parsed_messages,
    same_text,
    text_list,
    turns_of,
)
from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Turn
from fpo_core.data.conversations.prompts import (
    PROMPTS,
    read_prompt,
    read_tools,
    refuse_unsupported,
    with_system,
)
from fpo_core.data.conversations.sides import find_sides
from fpo_core.data.drops import Unusable


class Compared(NamedTuple):
    """Shared turns, then each side's own."""

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    tools: tuple[Any, ...]


def read_preferences(fields: Fields, pairs_per_prompt: int = 1) -> list[Compared]:
    """Read the comparisons of one row, whatever its shape.

    Args:
        fields: the row; what is used and what is worth a note is recorded there.
        pairs_per_prompt: most pairs made from a ranking of more than two answers.

    Raises:
        Unusable: the row is no comparison, or one that cannot be learnt from.
    """
    refuse_unsupported(fields)
    tools = read_tools(fields)
    if not isinstance(fields.peek("input"), str) and "input" in fields:
        tools = _read_openai_input(fields) or tools
    answers = find_sides(fields, pairs_per_prompt)
    sides = [[_side(value, fields) for value in pair] for pair in answers]
    prompt = _prompt(fields, sides)
    if any(hh.spaces_answers(fields.peek(name)) for name in PROMPTS):
        sides = [[[*map(hh.unspaced, side[:1]), *side[1:]] for side in pair] for pair in sides]
    return [_joined(fields, prompt, chosen, rejected, tools) for chosen, rejected in sides]


def _read_openai_input(fields: Fields) -> tuple[Any, ...]:
    """Read OpenAI's `input: {messages, tools}` as the prompt; returns its tools."""
    given = fields.peek("input")
    if not isinstance(given, dict):
        return ()
    inner = Fields(given)
    inner.take("messages")
    refuse_unsupported(inner)
    tools = read_tools(inner)
    fields.unused_inside += [f"input.{name}" for name in inner.unused]
    return tools


def _side(value: Any, fields: Fields) -> list[Turn]:
    """Read one side: an answer, or the whole conversation that ends with it."""
    if isinstance(value, str):
        parsed = parsed_messages(value)
        if parsed is not None:
            fields.notes.add("json_text")
            return turns_of(parsed, "a side")
        asked = hh.is_answer(value) and any(hh.is_dialogue(fields.peek(name)) for name in PROMPTS)
        is_marked = asked or hh.is_dialogue(value)
        return hh.dialogue_turns(value) if is_marked else [Turn(ASSISTANT, value)]
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        if len(value) == 1:
            return _side(value[0], fields)
        names = [name for name in ("chosen", "rejected") if fields.peek(name) == value]
        path = ", ".join(f"{name}: {name}.0" for name in names) or "chosen: NAME.0"
        raise Unusable(
            "candidates",
            f"a side is a list of several answers. Name one: data.columns={{{path}}}",
        )
    if isinstance(value, list) and all(isinstance(one, (int, float)) for one in value):
        raise Unusable("token_ids", "a side is a list of numbers (token ids?), expected text")
    if isinstance(value, (bool, int, float)):
        raise Unusable("not_text", f"a side is the number {str(value)[:20]}, expected text")
    return turns_of(value, "a side")


def _prompt(fields: Fields, sides: list[list[list[Turn]]]) -> list[Turn]:
    """Read the row's own prompt; a column that only repeats a side is no prompt."""
    whole = [turns for pair in sides for turns in pair]
    names = [name for name in PROMPTS if not _repeats(fields, name, whole)]
    return with_system(fields, read_prompt(fields, names))


def _repeats(fields: Fields, name: str, sides: list[list[Turn]]) -> bool:
    """Return whether a column of messages is one of the sides, as in UltraFeedback's."""
    if name == "prompt":  # arena votes: a list with a question per round
        asked = text_list(fields.peek(name))
        if asked is None or not all(asked == _questions(side) for side in sides):
            return False
        fields.take(name)
        return True
    if name not in ("messages", "conversations", "conversation") or name not in fields:
        return False
    value = fields.peek(name)
    if value in (fields.peek("chosen"), fields.peek("rejected")):
        fields.take(name)
        return True
    turns = turns_of(value, f"{name!r}")
    is_side = turns in sides
    others = [other for other in PROMPTS if other != name and other in fields]
    if not is_side and not (others and turns[-1:] in [side[-1:] for side in sides]):
        return False
    fields.take(name)
    return True


def _questions(turns: list[Turn]) -> list[str]:
    return [turn.content for turn in turns if turn.role == USER]


def _joined(
    fields: Fields,
    prompt: list[Turn],
    chosen: list[Turn],
    rejected: list[Turn],
    tools: tuple[Any, ...],
) -> Compared:
    """Put prompt and sides together, split where the sides part, and check the result."""
    given = [turn for turn in prompt if turn.role != SYSTEM]
    whole = [_is_whole(side) for side in (chosen, rejected)]
    for side in (chosen, rejected):
        if side and not _has_answer(side):
            raise Unusable("not_assistant", f"a side is said by the {side[0].role}")
    if chosen == rejected and any(turn.says_something for turn in chosen):
        raise Unusable("identical")
    if not given and not all(whole):
        raise Unusable(*_without_prompt(fields, chosen, rejected))
    if whole[0] != whole[1] and chosen and rejected:
        raise Unusable("prompt_mismatch", "one side repeats the prompt, the other does not")
    both = [chosen, rejected]
    prefilled = False
    if all(whole) and not _continue(given, both):
        _check_prompt(given, chosen, rejected)
        both = [_with_given_system(prompt, side) for side in both]
    else:
        prefilled = all(prompt[-1].role == side[0].role == ASSISTANT for side in both if side)
        _note_repeated_prompt(fields, prompt, both)
        both = [[*prompt, *side] for side in both]
    shared = len(prompt) if prefilled else _shared(*both)
    found = Compared(
        prompt=tuple(both[0][:shared]),
        chosen=_without_trailing(fields, both[0][shared:]),
        rejected=_without_trailing(fields, both[1][shared:]),
        tools=tools,
    )
    _check(found, prefilled)
    _note_turns(fields, found, prefilled)
    return found


def _is_whole(side: list[Turn]) -> bool:
    """Return whether a side brings its own prompt."""
    return bool(side) and side[0].role in (SYSTEM, USER)


def _continue(given: list[Turn], sides: list[list[Turn]]) -> bool:
    """Return whether both sides go on with the user's next turn after a prompt that is answered."""
    if not given or given[-1].role != ASSISTANT or any(side[0].role != USER for side in sides):
        return False
    return not any(
        len(side) > len(given)
        and all(
            same_text(turn.content, own.content) for turn, own in zip(given, side, strict=False)
        )
        for side in sides
    )


def _without_prompt(fields: Fields, chosen: list[Turn], rejected: list[Turn]) -> tuple[str, str]:
    if fields.first(PROMPTS) or fields.first(("input", "context")):
        return "empty_prompt", "the prompt is empty"
    if any(turn.role == USER for turn in (*chosen, *rejected)):
        return "prompt_mismatch", "one side brings its own prompt, the other does not"
    have = ", ".join(map(repr, fields.names))
    return "shape", f"the row has no prompt. It has {have}. Set data.columns.prompt"


def _check_prompt(given: list[Turn], chosen: list[Turn], rejected: list[Turn]) -> None:
    """Raise where the row's prompt is not the one that both sides begin with."""
    if not any(turn.content.strip() for turn in given):
        return
    shared = [turn for turn in chosen[: _shared_length(chosen, rejected)] if turn.role != SYSTEM]
    texts = [turn.content for turn in given]
    said = [turn.content for turn in shared]
    count = len(texts)
    begins, ends = said[:count], said[-count:]
    if not any(
        len(found) == count and all(map(same_text, texts, found)) for found in (begins, ends)
    ):
        raise Unusable("prompt_mismatch")


def _with_given_system(prompt: list[Turn], side: list[Turn]) -> list[Turn]:
    """Return a whole side with the system prompt that only the row has."""
    system = [turn for turn in prompt[:1] if turn.role == SYSTEM]
    if not system:
        return side
    if side[0].role != SYSTEM:
        return [*system, *side]
    if same_text(side[0].content, system[0].content):
        return side
    raise Unusable("two_systems", "the row's system prompt differs from the one in the sides")


def _shared_length(chosen: list[Turn], rejected: list[Turn]) -> int:
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    return count


def _shared(chosen: list[Turn], rejected: list[Turn]) -> int:
    """Return how many turns the sides share, so that both have an answer left."""
    count = min(_shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    # An answer that only one side continues after belongs to both sides' answers.
    while count > 0 and not all(_has_answer(side[count:]) for side in (chosen, rejected)):
        count -= 1
    return max(count, 0)


def _has_answer(turns: list[Turn]) -> bool:
    return any(turn.role == ASSISTANT for turn in turns)


def _without_trailing(fields: Fields, side: list[Turn]) -> tuple[Turn, ...]:
    """Return a side up to its last answer: nothing after it is scored."""
    end = len(side)
    while end and side[end - 1].role != ASSISTANT:
        end -= 1
    if end == 0:
        raise Unusable("no_answer")
    if end < len(side):
        fields.notes.add("trailing_turns")
    return tuple(side[:end])


def _check(found: Compared, prefilled: bool) -> None:
    """Raise for a comparison that cannot be learnt from."""
    if not any(turn.role != SYSTEM for turn in found.prompt):
        raise Unusable("no_shared_prompt")
    check_turns(found.prompt)
    for side in (found.chosen, found.rejected):
        if not all(turn.says_something for turn in side if turn.role == ASSISTANT):
            raise Unusable("empty")
        if not all(turn.is_learnt for turn in side if turn.role == ASSISTANT):
            raise Unusable("unsupported", "a side has a turn with `weight: 0`, and all are scored")
        joint = found.prompt[:-1] if prefilled else found.prompt
        check_order((*joint, *side))


def check_turns(prompt: tuple[Turn, ...]) -> None:
    """Raise for a prompt in which the user says nothing.

    Raises:
        Unusable: an empty user turn.
    """
    if any(turn.role == USER and not turn.content.strip() for turn in prompt):
        raise Unusable("empty_prompt", "a user turn of the prompt is empty")


def check_order(turns: tuple[Turn, ...]) -> None:
    """Raise for turns in an order that is no dialogue.

    Raises:
        Unusable: the assistant begins, or answers twice in a row.
    """
    spoken = [turn for turn in turns if turn.role != SYSTEM]
    if spoken and spoken[0].role == ASSISTANT:
        raise Unusable("assistant_first")
    for before, turn in zip(spoken, spoken[1:], strict=False):
        if before.role == turn.role == ASSISTANT:
            raise Unusable("two_answers")


def _note_repeated_prompt(fields: Fields, prompt: list[Turn], sides: list[list[Turn]]) -> None:
    question = prompt[-1].content.strip()
    if question and all(side and side[0].content.startswith(question) for side in sides):
        fields.notes.add("repeats_prompt")


def _note_turns(fields: Fields, found: Compared, prefilled: bool) -> None:
    if prefilled:
        fields.notes.add("prefilled")
    if max(len(found.chosen), len(found.rejected)) > 1:
        fields.notes.add("several_turns")
        if found.chosen[0].role == found.rejected[0].role == ASSISTANT:
            fields.notes.add("sides_part_early")
