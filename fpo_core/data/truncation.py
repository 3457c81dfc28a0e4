"""Length limits: drop what is too long, or cut it, in token space.

A prompt is cut only where prompt and longest answer exceed `max_length` together, to
`max_prompt_length` tokens (the authors' rule). What the template writes around the last user turn
(BOS, the turn's opener, the assistant's opener) always stays. An answer is cut to the room that
the prompt leaves. A cut answer has no end-of-turn token, since nothing ends there, unless the
recipe asks for it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Conversation, Turn
from fpo_core.data.drops import Unusable
from fpo_core.recipe.data import Truncation


class Limits(NamedTuple):
    """Longest prompt and longest prompt + response in tokens, and what exceeding them means."""

    max_prompt_length: int | None
    max_length: int
    section: str = "data"  # of the recipe, for messages
    truncation: Truncation = "drop"
    truncate_answers: bool | Literal["with_end"] = False


class Cut(NamedTuple):
    """Token ids of a pair, and the ranges of each answer that are not scored."""

    prompt: list[int]
    answers: list[list[int]]
    unscored: list[list[int]]

    @property
    def longest(self) -> int:
        """Return the tokens of the longest answer."""
        return max(map(len, self.answers))


Encode = Callable[[Sequence[Turn], Sequence[Any]], list[int]]
Around = Callable[[Sequence[Turn], Sequence[Any]], tuple[list[int], list[int]]]


class PromptTools(NamedTuple):
    """What cutting needs of the template and the tokenizer."""

    encode: Encode  # token ids of a prompt with the assistant's opener
    around: Around  # token ids before and after the text of a prompt's last turn


def cut_pair(
    cut: Cut, given: Conversation, limits: Limits, end: list[int], tools: PromptTools
) -> Cut:
    """Bring a pair within the limits.

    Args:
        cut: the whole pair.
        given: its conversation.
        limits: the limits.
        end: token ids of the end of turn.
        tools: the template and the tokenizer.

    Raises:
        Unusable: it does not fit, and the limits say drop.
    """
    fits = len(cut.prompt) + cut.longest <= limits.max_length
    if limits.truncation == "drop":
        _check_prompt(cut, limits)
    elif not fits:
        cut = cut._replace(prompt=_cut_prompt(cut, given, limits, tools))
    room = limits.max_length - len(cut.prompt)
    if cut.longest <= room:
        return cut
    if not limits.truncate_answers:
        raise Unusable(
            "too_long",
            f"{len(cut.prompt) + cut.longest} tokens, {limits.section}.max_length is "
            f"{limits.max_length}",
        )
    return _cut_answers(cut, room, end if limits.truncate_answers == "with_end" else [])


def _check_prompt(cut: Cut, limits: Limits) -> None:
    most = limits.max_prompt_length
    name, allowed = "max_prompt_length", most
    if most is None:
        name, allowed = "max_length", limits.max_length - 1
    assert allowed is not None
    if len(cut.prompt) > allowed:
        given = most if most is not None else limits.max_length
        raise Unusable(
            "prompt_too_long",
            f"the prompt has {len(cut.prompt)} tokens, {limits.section}.{name} is {given}",
        )


def _cut_prompt(cut: Cut, given: Conversation, limits: Limits, tools: PromptTools) -> list[int]:
    most = limits.max_prompt_length
    if most is None:  # what the longest answer leaves, and never less than half
        most = max(limits.max_length - cut.longest, limits.max_length // 2)
    if len(cut.prompt) <= most:
        return cut.prompt
    if given.prompt[-1].role == ASSISTANT:
        raise Unusable("prompt_too_long", "a prompt that ends in an assistant turn cannot be cut")
    if limits.truncation == "keep_start":
        return _keep_start(cut.prompt, given, most, tools)
    return _keep_end(given, most, tools)


def _keep_start(prompt: list[int], given: Conversation, most: int, tools: PromptTools) -> list[int]:
    """Return a prompt's start, of which the user says something, with the assistant's opener."""
    _, after = tools.around(given.prompt, given.tools)
    first = next((n for n, turn in enumerate(given.prompt) if turn.role == USER), 0)
    before, _ = tools.around(given.prompt[: first + 1], given.tools)
    _check_room(most - len(before) - len(after), given)
    return [*prompt[: most - len(after)], *after]


def _keep_end(given: Conversation, most: int, tools: PromptTools) -> list[int]:
    """Return a prompt's end: without its first turns, then without the start of the last."""
    system = [turn for turn in given.prompt[:1] if turn.role == SYSTEM]
    turns = list(given.prompt[len(system) :])
    while len(turns) > 1:
        turns = _without_first_round(turns)
        ids = tools.encode([*system, *turns], given.tools)
        if len(ids) <= most:
            return ids
    before, after = tools.around([*system, *turns], given.tools)
    _check_room(most - len(before) - len(after), given)
    ids = tools.encode([*system, *turns], given.tools)
    return [*before, *ids[-(most - len(before)) :]]


def _without_first_round(turns: list[Turn]) -> list[Turn]:
    """Return turns from the next one of the user on."""
    later = (place for place, turn in enumerate(turns) if place and turn.role == USER)
    return turns[next(later, len(turns) - 1) :]


def _cut_answers(cut: Cut, room: int, end: list[int]) -> Cut:
    answers: list[list[int]] = []
    unscored: list[list[int]] = []
    for ids, ranges in zip(cut.answers, cut.unscored, strict=True):
        if len(ids) > room:
            kept, ranges = _clipped(ranges, room - len(end))
            ids = ids[:kept]
            # Cut between turns, an answer has the end that it was given.
            ids = ids if end and ids[-len(end) :] == end else [*ids, *end]
        answers.append(ids)
        unscored.append(ranges)
    if len(answers) == 2 and answers[0] == answers[1]:
        raise Unusable("identical", "chosen and rejected are the same up to where they are cut")
    return Cut(cut.prompt, answers, unscored)


def _clipped(ranges: list[int], length: int) -> tuple[int, list[int]]:
    """Return a length and ranges within it that do not end in unscored tokens."""
    kept: list[int] = []
    for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
        if stop < length:
            kept += [start, stop]
        elif start < length:
            length = start
    if length < 1:
        raise Unusable("too_long", "nothing of an answer is left after cutting")
    return length, kept


def _check_room(room: int, given: Conversation) -> None:
    """Raise where nothing that the user says is left of a prompt."""
    if room < 1 and given.prompt[0].role == SYSTEM:
        raise Unusable("prompt_too_long", "the system prompt alone fills max_prompt_length")
    if room < 1:
        raise Unusable("prompt_too_long", "the limits leave no room for the prompt's text")
