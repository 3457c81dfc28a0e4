"""Preference pairs from the shapes that preference data comes in.

Recognised by their keys, row by row:

- plain: ``prompt``, ``chosen``, ``rejected`` as strings (TRL, and this project's own data);
- conversational: ``prompt`` as messages, the sides as messages or strings (TRL);
- UltraFeedback-binarized: ``prompt`` a string, the sides whole conversations;
- ShareGPT: ``conversations`` of ``from``/``value``, the sides one such turn;
- HH-RLHF: two whole dialogues as text, ``Human:`` and ``Assistant:`` turns.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from fpo_core.data.sources.hub import SplitFiles
from fpo_core.data.sources.rows import Row, read_rows
from fpo_core.errors import FPOError

Message = dict[str, str]
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system",
}  # fmt: skip
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class PreferencePair(NamedTuple):
    """One comparison, before tokenization."""

    prompt: tuple[Message, ...]  # the turns up to the answer; the last is the user's
    chosen: str
    rejected: str | None  # None: an answer to learn, with nothing to compare it with
    where: str  # file and line

    @property
    def pair_id(self) -> str:
        """16 hex digits that follow from the content alone."""
        content = json.dumps([self.prompt, self.chosen, self.rejected], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_pairs(path: str, hub: SplitFiles | None = None) -> Iterator[PreferencePair]:
    """Stream the pairs of a source.

    Args:
        path: the file, or the name of a split on the hub.
        hub: the split's files.

    Raises:
        FPOError: a row that is not a preference pair, named by file and line.
    """
    for row in read_rows(path, hub):
        yield pair_of(row)


def pair_of(row: Row) -> PreferencePair:
    """Read one row, whatever its shape."""
    value = row.value
    for side in ("chosen", "rejected"):
        if value.get(side) in (None, "", []):
            have = ", ".join(map(repr, sorted(value))) or "no keys"
            raise FPOError(f"{row.where}: the row has no {side!r} (it has {have})")
    try:
        prompt, chosen, rejected = _parts(value)
        for text in (*(turn["content"] for turn in prompt), chosen, rejected):
            if not isinstance(text, str):
                raise TypeError(f"a text is {type(text).__name__}")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise FPOError(
            f"{row.where}: not a preference pair of a known shape ({type(error).__name__}: "
            f"{error}); expected prompt/chosen/rejected, ShareGPT conversations, or HH-RLHF "
            f"dialogues"
        ) from error
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise FPOError(f"{row.where}: the prompt does not end in a user's turn")
    return PreferencePair(tuple(prompt), chosen, rejected, row.where)


def _parts(value: dict[str, Any]) -> tuple[list[Message], str, str]:
    chosen, rejected = value["chosen"], value["rejected"]
    if "conversations" in value:
        prompt = [message_of(turn) for turn in value["conversations"]]
        return prompt, message_of(chosen)["content"], message_of(rejected)["content"]
    if "prompt" not in value and "instruction" not in value:
        return _hh_dialogues(chosen, rejected)
    given = value["prompt"] if "prompt" in value else value["instruction"]
    if isinstance(given, str):
        prompt = [{"role": "user", "content": given}]
        if value.get("system"):
            prompt.insert(0, {"role": "system", "content": value["system"]})
    else:
        prompt = [message_of(turn) for turn in given]
    return prompt, _answer(chosen), _answer(rejected)


def message_of(turn: dict[str, str]) -> Message:
    """A turn in ``role``/``content`` or ``from``/``value`` form."""
    role = turn.get("role") or turn["from"]
    content = turn["content"] if "content" in turn else turn["value"]
    return {"role": _ROLES[role], "content": content}


def _answer(side: str | list[dict[str, str]] | dict[str, str]) -> str:
    if isinstance(side, str):
        return side
    last = message_of(side[-1] if isinstance(side, list) else side)
    if last["role"] != "assistant":
        raise TypeError("a side does not end in an assistant's turn")
    return last["content"]


def _hh_dialogues(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    turns = [_hh_turns(side) for side in (chosen, rejected)]
    if turns[0][:-1] != turns[1][:-1]:
        raise TypeError("the two dialogues do not share their first turns")
    return turns[0][:-1], turns[0][-1]["content"], turns[1][-1]["content"]


def _hh_turns(dialogue: str) -> list[Message]:
    parts = _HH_TURN.split(dialogue)
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": names[name], "content": text.strip()}
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise TypeError("no Human/Assistant turns in the text")
    return turns
