"""Dialogues written as one text with role markers, as in HH-RLHF and Nectar."""

import re

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Turn
from fpo_core.data.drops import Unusable

# At the start of the text, or after a blank line.
_MARKER = re.compile(r"(?:\A\s*|\n[ \t\r]*\n[ \t]*)(Human|Assistant|System):")
# Some write each turn on a line of its own, without blank lines.
_LINE_MARKER = re.compile(r"(?:\A\s*|\n[ \t]*)(Human|Assistant|System):")
_SEARCHED = 20_000  # characters; markers stand early
_START = re.compile(r"\s*(Human|System):")
_ANSWER = re.compile(r"\n[ \t]*Assistant:")
# Markers of formats that are not read: their dialogues stay one turn, and that is counted.
_OTHER = re.compile(
    r"(?m)^[ \t]*(?:(?:USER|ASSISTANT|User|GPT|H|A):\s"
    r"|###\s*(?:Human|Assistant|Instruction|Response)"
    r"|<extra_id_1>|<\|(?:im_start|user|assistant|prompter)\|>|\[INST\]|<start_of_turn>)"
)
_ROLES = {"Human": USER, "Assistant": ASSISTANT, "System": SYSTEM}


def is_dialogue(text: object) -> bool:
    """Return whether a value is the text of a whole dialogue: it begins with a marked turn."""
    return isinstance(text, str) and bool(_START.match(text) and _ANSWER.search(text))


def has_other_markers(text: str) -> bool:
    """Return whether a text has another format's role markers, a turn's and an answer's."""
    return len(_OTHER.findall(text[:_SEARCHED])) > 1


def is_answer(text: str) -> bool:
    """Return whether a text begins with the marker of an answer."""
    return text.lstrip().startswith("Assistant:")


def dialogue_turns(text: str) -> list[Turn]:
    """Read the turns of a marked text.

    A marker stands at the start of the text or after a blank line; after any line break where a
    text has no blank lines before markers. The last turn may be empty: a prompt ends with
    `Assistant:` and nothing after it.

    Raises:
        Unusable: the text has no markers.
    """
    found = list(_MARKER.finditer(text))
    if len(found) < 2:
        found = list(_LINE_MARKER.finditer(text))
    if not found:
        raise Unusable("shape", "a text has no Human: and Assistant: turns")
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [
        Turn(_ROLES[match[1]], text[match.end() : end].strip())
        for match, end in zip(found, ends, strict=True)
    ]


def prompt_turns(text: str) -> list[Turn]:
    """Read the turns of a prompt in marked text; the opener of the answer is left off."""
    turns = dialogue_turns(text)
    if turns[-1].role == ASSISTANT and not turns[-1].content:
        turns.pop()
    return turns


def spaces_answers(text: object) -> bool:
    """Return whether a prompt ends in a bare `Assistant:`, whose space the answers begin with."""
    return isinstance(text, str) and text.endswith("\nAssistant:") and is_dialogue(text)


def unspaced(turn: Turn) -> Turn:
    """Return an answer without the space that belongs to the marker before it, as in rm-static."""
    return turn._replace(content=turn.content.removeprefix(" "))
