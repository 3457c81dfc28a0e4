"""The inner form of a row: shared turns, then each side's own.

Every shape of preference or dialogue data is read into it, and the chat template renders it. A
field of a row that no `Conversation` can hold drops the row; nothing is ignored.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

Message = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str
    extra: tuple[tuple[str, Any], ...] = ()  # tool_calls, reasoning_content, name, ... as given
    is_learnt: bool = True  # False: a message of OpenAI's format with `weight: 0`

    @property
    def message(self) -> Message:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}

    @property
    def says_something(self) -> bool:
        """Return whether the turn has text or calls a tool."""
        calls = any(name in ("tool_calls", "function_call") for name, _ in self.extra)
        return calls or bool(self.content.strip())


class Conversation(NamedTuple):
    """One comparison, or one answer to learn, before it is rendered.

    The prompt may end in an assistant turn. The sides then continue that turn (a prefilled
    answer), unless they begin with another speaker.
    """

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...] | None  # None: an answer to learn, with nothing to compare it with
    where: str  # file and line
    tools: tuple[Any, ...] = ()
    metadata: Mapping[str, Any] = {}

    @property
    def sides(self) -> tuple[tuple[Turn, ...], ...]:
        """Return the sides there are."""
        return (self.chosen,) if self.rejected is None else (self.chosen, self.rejected)

    def whole(self, side: tuple["Turn", ...]) -> tuple["Turn", ...]:
        """Return all turns of a side; a prefilled answer and its rest are one turn."""
        last, first = self.prompt[-1], side[0]
        if last.role == first.role == ASSISTANT:
            answer = first._replace(content=last.content + first.content)
            return (*self.prompt[:-1], answer, *side[1:])
        return (*self.prompt, *side)

    @property
    def pair_id(self) -> str:
        """Return 16 hex digits that follow from the content alone."""
        sides = [_plain_side(self.chosen), _plain_side(self.rejected)]
        content: list[Any] = [[turn.message for turn in self.prompt], *sides]
        if self.tools:
            content.append(self.tools)
        text = json.dumps(content, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def prompt_key(self) -> int:
        """Return a number that prompts share which differ in case and white space only."""
        words = (f"{turn.role} {' '.join(turn.content.split()).casefold()}" for turn in self.prompt)
        return digest_number("\n".join(words))


def digest_number(text: str) -> int:
    """Return a 64-bit number that follows from a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def share_of(number: int, salt: str) -> float:
    """Return a fixed number in [0, 1) for a key, as good as random between salts."""
    return digest_number(f"{salt}/{number}") / 2.0**64


def _plain_side(side: tuple[Turn, ...] | None) -> Any:
    # An answer of one plain turn is its text, so that its pair keeps the id of earlier versions.
    if side is None:
        return None
    if len(side) == 1 and not side[0].extra:
        return side[0].content
    return [turn.message for turn in side]
