"""What judged benchmarks share: which questions are asked, of whom, and intervals over them."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fpo_core.bench.contents import join_strictly
from fpo_core.bench.model import Answers, Question
from fpo_core.errors import FPOError


def asked_questions(
    questions: Sequence[Question], limit: int | None, *answers: Answers
) -> list[Question]:
    """The first ``limit`` questions, each answered by every model, turn for turn.

    Raises:
        FPOError: a question without an answer or with too few turns, an answer to no question.
    """
    asked = list(questions if limit is None else questions[:limit])
    every = [question.id for question in questions]
    for given in answers:
        wanted = [question.id for question in asked]
        join_strictly(wanted, given.turns, f"answers of {given.model!r}", allowed=every)
        for question in asked:
            turns = len(given.turns[question.id])
            if turns != len(question.turns):
                raise FPOError(
                    f"answers of {given.model!r}: question {question.id!r} has "
                    f"{len(question.turns)} turns, {turns} are answered. Generate them again"
                )
    return asked


def digest_of(rules: Any) -> str:
    """sha256 of what goes into JSON."""
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def ratio_with_interval(
    sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int
) -> tuple[float, float | None, float | None]:
    """A mean over readings, with its 95 % bootstrap interval over questions.

    A question is drawn with all of its readings, since they are not independent. One that has
    none counts for nothing, and a draw of nothing but such questions is left out.

    Args:
        sums: of a question's readings [Q].
        counts: how many they are [Q].
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        sum(sums) / sum(counts) and the 2.5th and 97.5th percentile; NaN and None without readings.
    """
    if not counts.sum():
        return float("nan"), None, None
    picked = np.random.default_rng(seed).integers(0, len(counts), size=(resamples, len(counts)))
    drawn = counts[picked].sum(1)
    some = drawn > 0
    means = sums[picked].sum(1)[some] / drawn[some]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)
