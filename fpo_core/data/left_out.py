"""Find what a chat template leaves out of a conversation, and drop the conversation for it.

A template ignores what it does not know: a role, tools, tool calls, reasoning. The model would be
trained on something else than the data, so every such part is looked for in the rendered text.
"""

from collections.abc import Sequence
from typing import Any

from fpo_core.data.conversations.messages import REASONING_KEYS
from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, TOOL, USER, Conversation, Turn
from fpo_core.data.drops import Unusable
from fpo_core.data.render import MARK, ChatFormat

# Parts of a message that say who speaks or which call is answered: little is lost without them.
_NAMES = ("name", "tool_call_id")


def check_rendered(chat: ChatFormat, given: Conversation, wholes: Sequence[str]) -> set[str]:
    """Raise where the template leaves out what changes the prompt or an answer.

    Args:
        chat: the template.
        given: the conversation.
        wholes: the rendered text of each side with its prompt.

    Returns:
        What is worth a note, keys of `NOTES`.

    Raises:
        Unusable: naming what is left out.
    """
    noted: set[str] = set()
    if given.tools and _renders_as(chat, given.whole(given.chosen), (), wholes[0]):
        raise Unusable("not_rendered", "the chat template does not render `tools`")
    for side, text in zip(given.sides, wholes, strict=True):
        noted |= _check_turns(chat, given, side, text)
        noted |= _check_extras(chat, given, side, text)
        if any(turn.content.strip() not in text for turn in side):
            noted.add("answer_shortened")
        if side[-1].content.rstrip().endswith(chat.end.strip()):
            noted.add("doubled_end")
    written = [turn.content for turn in given.prompt]
    written += [turn.content for side in given.sides for turn in side]
    if any(token in content for content in written for token in chat.control_tokens):
        noted.add("special_tokens")
    return noted


def _check_turns(
    chat: ChatFormat, given: Conversation, side: tuple[Turn, ...], text: str
) -> set[str]:
    """Raise where a turn is not rendered.

    Templates may leave out part of an earlier answer (its thoughts), or quote what a tool says.
    """
    noted: set[str] = set()
    turns = given.whole(side)
    answers_from = len(turns) - len(side)
    for place, turn in enumerate(turns):
        said = turn.content.strip()
        # A text that several turns have has to stand there as often. What a tool says is short,
        # and may stand in the template itself.
        often = text.count(said) >= sum(said in each.content for each in turns)
        if not said or (often and turn.role != TOOL):
            continue
        other = (*turns[:place], turn._replace(content=MARK), *turns[place + 1 :])
        is_altered = turn.role in (SYSTEM, USER) and said not in text
        if is_altered or _renders_as(chat, other, given.tools, text):
            what = {ASSISTANT: "the text of an assistant"}.get(turn.role, f"a {turn.role}")
            raise Unusable("not_rendered", f"the chat template leaves out {what} turn")
        if turn.role == ASSISTANT and place < answers_from:
            noted.add("earlier_shortened")
    return noted


def _check_extras(
    chat: ChatFormat, given: Conversation, side: tuple[Turn, ...], text: str
) -> set[str]:
    """Raise where tool calls or reasoning are not rendered.

    Templates may leave out the reasoning of earlier turns, as their models are used.
    """
    noted: set[str] = set()
    turns = given.whole(side)
    answers_from = len(turns) - len(side)
    for place, turn in enumerate(turns):
        for name, _ in turn.extra:
            rest = tuple(item for item in turn.extra if item[0] != name)
            without = (*turns[:place], turn._replace(extra=rest), *turns[place + 1 :])
            if not _renders_as(chat, without, given.tools, text):
                continue
            if name in _NAMES:
                noted.add("names_left_out")
            elif name in REASONING_KEYS and place < answers_from:
                noted.add("earlier_shortened")
            else:
                raise Unusable("not_rendered", f"the chat template does not render `{name}`")
    return noted


def _renders_as(chat: ChatFormat, turns: Sequence[Turn], tools: Sequence[Any], text: str) -> bool:
    try:
        return chat.up_to_end(chat.render(turns, tools)) == text
    except Unusable:
        return False  # the template needs what was left out
