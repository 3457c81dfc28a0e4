"""Answers to learn, from the shapes that instruction data comes in.

Recognised by their keys, row by row:

- dialogues: ``messages`` (UltraChat), or ``conversations`` of ``from``/``value`` (ShareGPT);
- instructions: ``instruction``, ``input``, ``output`` (Alpaca), with ``system`` where it is given;
- ``prompt`` and ``completion`` (or ``response``), the prompt as text or messages;
- preference pairs in every shape of ``fpo_core/data/pairs.py``: the chosen side is learnt.

Each comes out as a ``PreferencePair`` that has no rejected side.
"""

from collections.abc import Iterator
from typing import Any, Literal

from fpo_core.data.pairs import Message, PreferencePair, message_of, pair_of
from fpo_core.data.sources.hub import SplitFiles
from fpo_core.data.sources.rows import Row, read_rows
from fpo_core.errors import FPOError

Turns = Literal["last", "all"]


def read_instructions(
    path: str, turns: Turns, hub: SplitFiles | None = None
) -> Iterator[PreferencePair]:
    """Stream the answers of a source.

    Args:
        path: the file, or the name of a split on the hub.
        turns: of a dialogue, its last answer, or each of them after the turns before it.
        hub: the split's files.

    Raises:
        FPOError: a row that is no dialogue, named by file and line.
    """
    for row in read_rows(path, hub):
        dialogue = _dialogue_of(row)
        last = len(dialogue) - 1
        for number, turn in enumerate(dialogue):
            if turn["role"] == "assistant" and (turns == "all" or number == last):
                yield PreferencePair(tuple(dialogue[:number]), turn["content"], None, row.where)


def _dialogue_of(row: Row) -> list[Message]:
    """The row's turns, the last of them an answer, each answer after a user's turn."""
    value = row.value
    if "chosen" in value:
        pair = pair_of(row)
        return [*pair.prompt, {"role": "assistant", "content": pair.chosen}]
    try:
        dialogue = _turns(value)
        if not all(isinstance(turn["content"], str) for turn in dialogue):
            raise TypeError("a turn is not text")
    except (KeyError, TypeError, AttributeError) as error:
        have = ", ".join(map(repr, sorted(value))) or "no keys"
        raise FPOError(
            f"{row.where}: not instruction data of a known shape ({type(error).__name__}: {error}; "
            f"it has {have}); expected `messages`, `conversations`, instruction/input/output, "
            f"prompt and completion, or preference pairs"
        ) from error
    while dialogue and dialogue[-1]["role"] != "assistant":
        dialogue.pop()  # a question that nobody answered
    if not dialogue:
        raise FPOError(f"{row.where}: the dialogue has no answer to learn")
    for before, turn in zip([None, *dialogue], dialogue, strict=False):
        if turn["role"] == "assistant" and (before is None or before["role"] != "user"):
            raise FPOError(f"{row.where}: an answer does not follow a user's turn")
    return dialogue


def _turns(value: dict[str, Any]) -> list[Message]:
    for key in ("messages", "conversations"):
        if key in value:
            return [message_of(turn) for turn in value[key]]
    system = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    if "instruction" in value:
        request = value["instruction"]
        if value.get("input"):
            request += f"\n\n{value['input']}"
        return [*system, _user(request), _assistant(value["output"])]
    given = value["prompt"]
    answer = value["completion"] if "completion" in value else value["response"]
    prompt = [_user(given)] if isinstance(given, str) else [message_of(turn) for turn in given]
    if not isinstance(answer, str):
        answer = message_of(answer[-1])["content"]
    return [*system, *prompt, _assistant(answer)]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
