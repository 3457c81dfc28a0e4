"""What the files of a pack hold, row by row; faults are told with file and row.

A benchmark's files are read in the shape in which its authors publish them. Arena-Hard v0.1 has
had two: ``uid``/``prompt``/``messages``, and the older ``question_id``/``turns``/``choices``.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fpo_core.data.sources import Row, read_sound_rows
from fpo_core.errors import FPOError

# Of MT-Bench: the judge sees a reference answer in these categories.
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
MT_BENCH_TURNS = 2
SHOWN = 3  # ids that an error lists
_TYPES: dict[type, str] = {str: "text", list: "a list", dict: "an object"}


class Item(NamedTuple):
    """A question or an answer."""

    id: str
    turns: tuple[str, ...]  # the user's of a question, the model's of an answer
    label: str  # a question's category, the model that answered
    where: str  # file and row


def read_items(file: Path, read: Callable[[Row], Item]) -> dict[str, Item]:
    """A file's items by id, in its order.

    Raises:
        FPOError: a row that cannot be read, or an id that comes twice, with file and row.
    """
    items: dict[str, Item] = {}
    for row in read_sound_rows(file):
        item = read(row)
        if item.id in items:
            raise FPOError(
                f"{row.where}: the id {short(item.id)} is that of {items[item.id].where}, too; "
                f"take out one of the two rows"
            )
        items[item.id] = item
    return items


def arena_question(row: Row) -> Item:
    """A question of Arena-Hard."""
    if "question_id" in row.value:
        prompt = value_at(row, str, "turns", 0, "content")
    else:
        prompt = value_at(row, str, "prompt")
    return Item(_id(row, "question_id", "uid"), (prompt,), _label(row, "category"), row.where)


def arena_answer(row: Row) -> Item:
    """A model's answer to one of them."""
    if "choices" in row.value:
        text = value_at(row, str, "choices", 0, "turns", 0, "content")
        return Item(_id(row, "question_id"), (text,), _label(row, "model_id"), row.where)
    path = ("messages", -1, "content")
    content = value_at(row, object, *path)
    text = content if isinstance(content, str) else value_at(row, str, *path, "answer")
    return Item(_id(row, "uid"), (text,), _label(row, "model"), row.where)


def mt_bench_question(row: Row) -> Item:
    """A question of MT-Bench, with its two turns."""
    turns = _turns(row, "turns")
    return Item(_id(row, "question_id"), turns, value_at(row, str, "category"), row.where)


def mt_bench_answer(row: Row) -> Item:
    """A (reference) answer to both turns."""
    turns = _turns(row, "choices", 0, "turns")
    return Item(_id(row, "question_id"), turns, _label(row, "model_id"), row.where)


def alpaca_question(row: Row) -> Item:
    """An instruction of AlpacaEval, which is its own id."""
    instruction = value_at(row, str, "instruction")
    return Item(instruction, (instruction,), _label(row, "dataset"), row.where)


def alpaca_answer(row: Row) -> Item:
    """A model's output for one of them."""
    output = value_at(row, str, "output")
    return Item(value_at(row, str, "instruction"), (output,), _label(row, "generator"), row.where)


def ifeval_question(row: Row) -> Item:
    """A prompt of IFEval, with the instructions that it has to follow."""
    names = value_at(row, list, "instruction_id_list")
    for number in range(len(names)):
        value_at(row, str, "instruction_id_list", number)
    given = value_at(row, list, "kwargs")
    for number in range(len(given)):
        value_at(row, dict, "kwargs", number)
    if not names or len(names) != len(given):
        raise FPOError(
            f"{row.where}: {len(names)} instructions in instruction_id_list, {len(given)} entries "
            f"in kwargs; there is one for each, and at least one"
        )
    return Item(_id(row, "key"), (value_at(row, str, "prompt"),), "", row.where)


def value_at(row: Row, kind: type, *path: str | int) -> Any:
    """The value at a path of keys and positions.

    Raises:
        FPOError: it is not there, or not of this type.
    """
    value: Any = row.value
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError) as error:
            raise FPOError(
                f"{row.where}: no {_dotted(path)}; the columns are "
                f"{', '.join(map(str, row.value)) or 'none'}. Give the file as its authors "
                f"publish it"
            ) from error
    if not isinstance(value, kind):
        raise FPOError(f"{row.where}: {_dotted(path)} is {value!r:.60}, not {_TYPES[kind]}")
    return value


def join_strictly(
    wanted: Iterable[str], given: Iterable[str], what: str, allowed: Iterable[str] = ()
) -> None:
    """Refuse ids that do not match: every one wanted is given, and no others.

    Args:
        wanted: ids of the questions.
        given: ids of the answers.
        what: what has the answers, as the error names it.
        allowed: ids that may be given besides, such as questions that were not asked.

    Raises:
        FPOError: listing some of the ids on either side.
    """
    wanted, given = list(wanted), list(given)
    missing = sorted(set(wanted) - set(given))
    unknown = sorted(set(given) - set(wanted) - set(allowed))
    faults = []
    if missing:
        faults.append(f"nothing for {len(missing)} of {len(wanted)} questions ({_some(missing)})")
    if unknown:
        faults.append(f"{len(unknown)} for no question ({_some(unknown)})")
    if faults:
        raise FPOError(
            f"{what}: {'; '.join(faults)}. Questions and answers have to be of one version of the "
            f"benchmark, each question answered once"
        )


def short(text: str) -> str:
    """An id as an error shows it; AlpacaEval's are whole instructions."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _some(ids: list[str]) -> str:
    more = ", ..." if len(ids) > SHOWN else ""
    return ", ".join(short(one) for one in ids[:SHOWN]) + more


def _id(row: Row, *names: str) -> str:
    """The first of these columns that is there: text or a whole number."""
    name = next((one for one in names if one in row.value), names[-1])
    value = value_at(row, object, name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise FPOError(f"{row.where}: {name} is {value!r:.60}; an id is text or a whole number")
    return str(value)


def _label(row: Row, name: str) -> str:
    value = row.value.get(name, "")
    return value if isinstance(value, str) else ""


def _turns(row: Row, *path: str | int) -> tuple[str, ...]:
    turns = value_at(row, list, *path)
    if len(turns) != MT_BENCH_TURNS:
        raise FPOError(f"{row.where}: {_dotted(path)} has {len(turns)} turns, MT-Bench has two")
    return tuple(value_at(row, str, *path, turn) for turn in range(MT_BENCH_TURNS))


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))
