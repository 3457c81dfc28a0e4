"""Answers and questions belong together one to one: the strict join of every benchmark."""

from collections.abc import Sequence

from fpo_core.bench.model import Answers, Question
from fpo_core.errors import FPOError

_SHOWN = 5  # ids that an error lists


def check_answers(questions: Sequence[Question], answers: Answers, limit: int | None) -> None:
    """Refuse answers that do not fit the questions.

    Args:
        questions: all of the pack.
        answers: of one model.
        limit: only the first so many questions need an answer.

    Raises:
        FPOError: ids without an answer, answers to ids that the pack has not, or another number of
            turns; each is listed.
    """
    turns = {question.id: len(question.turns) for question in questions}
    missing = [question.id for question in questions[:limit] if question.id not in answers.turns]
    unknown = [name for name in answers.turns if name not in turns]
    uneven = [
        name for name, given in answers.turns.items() if name in turns and len(given) != turns[name]
    ]
    faults = [
        f"{len(names)} {what} ({_some(names)})"
        for names, what in (
            (missing, "without an answer"),
            (unknown, "not among the questions"),
            (uneven, "with another number of turns than the question"),
        )
        if names
    ]
    if faults:
        raise FPOError(
            f"the answers of {answers.model!r} do not match the benchmark's questions: ids "
            f"{'; '.join(faults)}. Both have to be of the same pack"
        )


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
