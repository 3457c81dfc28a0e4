"""MT-Bench: a judge rates a model's answers to two turns from 1 to 10, each answer by itself.

The rules are those of FastChat's single-answer grading (``fastchat/llm_judge``; Zheng et al. 2023,
arXiv:2306.05685): another prompt for maths, reasoning and coding, which shows a reference answer,
and for the second turn, which shows the conversation. The pairwise prompts are not used.

Some of the reference answers that FastChat publishes are wrong. They are a file of the pack and
part of ``template_digest``, so that ratings against corrected ones are told apart.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_core.bench.asked import asked_questions, digest_of, ratio_with_interval
from fpo_core.bench.contents import (
    MT_BENCH_TURNS,
    REFERENCE_CATEGORIES,
    mt_bench_answer,
    mt_bench_question,
    read_items,
)
from fpo_core.bench.model import Answers, JudgeRequest, Question, Reply, Score, Scored
from fpo_core.bench.pack import Pack
from fpo_core.bench.prompts import Prompt, read_mt_bench_prompts
from fpo_core.errors import FPOError

TEMPERATURE, MAX_TOKENS = 0.0, 2048  # FastChat's for its judge
SCALE = (1.0, 10.0)  # what the judge is asked for; FastChat counts other numbers, too
TURNS = range(1, MT_BENCH_TURNS + 1)
# FastChat's of the answers, by category (``llm_judge/common.py``), and of any other category.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}  # fmt: skip
OTHER_TEMPERATURE = 0.7
MODEL, OPPONENT = "model", "opponent"
_NUMBER = r"([0-9]+\.?[0-9]*)"
_RATING, _BACKUP = re.compile(rf"\[\[{_NUMBER}\]\]"), re.compile(rf"\[{_NUMBER}\]")


class Rating(NamedTuple):
    """One rating of one answer."""

    side: str  # "model" or "opponent"
    question: Question
    turn: int  # 1 or 2
    value: float | None  # None where it cannot be read


class MtBench:
    """The rules of MT-Bench; with a second model, both are rated and the difference is taken."""

    kind = "mt_bench"
    judged = True
    paired = False

    def questions(self, pack: Pack) -> list[Question]:
        """The pack's questions, in its order."""
        items = read_items(pack.files["questions"], mt_bench_question).values()
        return [Question(item.id, item.turns, item.label) for item in items]

    def temperature(self, question: Question) -> float | None:
        """What FastChat samples a question's answers at, by its category."""
        return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)

    def check(self, pack: Pack, limit: int | None) -> None:
        """Nothing beside what reading the pack checks."""
        del pack, limit

    def baseline(self, pack: Pack) -> Answers | None:
        """None: answers are rated by themselves."""
        del pack

    def template_digest(self, pack: Pack) -> str:
        """sha256 over the four prompts, the reference answers and the judge's settings."""
        return digest_of([_prompts(pack), _references(pack), TEMPERATURE, MAX_TOKENS])

    def requests(
        self, pack: Pack, answers: Answers, opponent: Answers | None, limit: int | None = None
    ) -> list[JudgeRequest]:
        """Both turns of every question; keys are ``model/ID/TURN`` and ``opponent/ID/TURN``.

        Args:
            pack: questions, judge's prompts and reference answers.
            answers: the model's.
            opponent: a second model, rated in the same way; None for none.
            limit: the first questions only.

        Raises:
            FPOError: no judge's prompts, answers that do not match the questions.
        """
        prompts, references = _prompts(pack), _references(pack)
        sides = _sides(answers, opponent)
        asked = asked_questions(self.questions(pack), limit, *sides.values())
        return [
            _request(prompts, references, side, question, given.turns[question.id], turn)
            for side, given in sides.items()
            for question in asked
            for turn in TURNS
        ]

    def follow_ups(
        self, requests: Sequence[JudgeRequest], replies: Mapping[str, Reply]
    ) -> list[JudgeRequest]:
        """Nothing: FastChat does not ask again."""
        del requests, replies
        return []

    def score(
        self,
        pack: Pack,
        answers: Answers,
        opponent: Answers | None,
        replies: Mapping[str, Reply],
        *,
        limit: int | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Scored:
        """Mean ratings over all, by turn and by category, and the differences to the opponent.

        Raises:
            FPOError: answers that do not match the questions.
        """
        sides = _sides(answers, opponent)
        asked = asked_questions(self.questions(pack), limit, *sides.values())
        ratings = {
            side: [
                Rating(side, question, turn, _value(replies, _key(side, question, turn)))
                for question in asked
                for turn in TURNS
            ]
            for side in sides
        }
        scores = _mean_scores("", "Rating", ratings[MODEL], resamples, seed)
        if opponent:
            against = _mean_scores("opponent_", "Rating", ratings[OPPONENT], resamples, seed)
            change = [_difference(*pair) for pair in zip(*ratings.values(), strict=True)]
            scores += _mean_scores("delta_", "Δ score", change, resamples, seed)
            scores += [one._replace(label=f"Opponent: {one.label}") for one in against]
        scores.append(_out_of_scale([one for side in ratings.values() for one in side]))
        rows = [_row(one, sides) for side in ratings.values() for one in side]
        return Scored(tuple(scores), tuple(rows))


def read_rating(text: str) -> float | None:
    """The rating in a judgment, as FastChat reads it.

    Returns:
        The first number in double brackets, else the first in single ones, else None.
    """
    found = _RATING.search(text) or _BACKUP.search(text)
    return float(found[1]) if found else None


def _request(
    prompts: dict[str, Prompt],
    references: dict[str, tuple[str, ...]],
    side: str,
    question: Question,
    answered: tuple[str, ...],
    turn: int,
) -> JudgeRequest:
    name, texts = "single-v1", {}
    if question.category in REFERENCE_CATEGORIES:
        name = "single-math-v1"
        first, second = references[question.id]
        texts = {"ref_answer_1": first, "ref_answer_2": second}
    if turn == 1:
        texts |= {"question": question.turns[0], "answer": answered[0]}
    else:
        name += "-multi-turn"
        texts |= {"question_1": question.turns[0], "question_2": question.turns[1]}
        texts |= {"answer_1": answered[0], "answer_2": answered[1]}
    prompt = prompts[name]
    messages = (("system", prompt.system), ("user", prompt.template.format(**texts)))
    return JudgeRequest(_key(side, question, turn), messages, MAX_TOKENS, TEMPERATURE)


def _mean_scores(
    prefix: str, label: str, ratings: list[Rating], resamples: int, seed: int
) -> list[Score]:
    """Over all of one side's ratings, by turn, and by category."""
    groups = {"rating": (label, ratings)}
    for turn in TURNS:
        of_turn = [one for one in ratings if one.turn == turn]
        groups[f"rating_turn_{turn}"] = (f"{label}, turn {turn}", of_turn)
    for category in dict.fromkeys(one.question.category for one in ratings):
        of_category = [one for one in ratings if one.question.category == category]
        groups[f"rating_{category}"] = (f"{label}, {category}", of_category)
    return [_mean_score(prefix + name, *group, resamples, seed) for name, group in groups.items()]


def _mean_score(name: str, label: str, ratings: list[Rating], resamples: int, seed: int) -> Score:
    """The mean of the ratings that could be read; the interval is over questions."""
    row_of = {question: row for row, question in enumerate({one.question.id: 0 for one in ratings})}
    sums, counts = np.zeros(len(row_of)), np.zeros(len(row_of), dtype=np.int64)
    for one in ratings:
        if one.value is not None:
            sums[row_of[one.question.id]] += one.value
            counts[row_of[one.question.id]] += 1
    found = ratio_with_interval(sums, counts, resamples, seed)
    return Score(name, label, "points", *found, int(counts.sum()), len(ratings))


def _difference(model: Rating, opponent: Rating) -> Rating:
    """The model's rating minus the opponent's of the same answer, where both could be read."""
    if model.value is None or opponent.value is None:
        return model._replace(value=None)
    return model._replace(value=model.value - opponent.value)


def _out_of_scale(ratings: list[Rating]) -> Score:
    read = [one.value for one in ratings if one.value is not None]
    outside = sum(not SCALE[0] <= value <= SCALE[1] for value in read)
    label = "Ratings that are not from 1 to 10"
    name = "out_of_scale"
    return Score(name, label, "verdicts", float(outside), None, None, len(read), len(ratings))


def _value(replies: Mapping[str, Reply], key: str) -> float | None:
    return read_rating(replies[key].text) if key in replies else None


def _row(rating: Rating, sides: dict[str, Answers]) -> dict[str, Any]:
    return {
        "question_id": rating.question.id,
        "category": rating.question.category,
        "turn": rating.turn,
        "side": rating.side,
        "model": sides[rating.side].model,
        "rating": rating.value,
    }


def _sides(answers: Answers, opponent: Answers | None) -> dict[str, Answers]:
    return {MODEL: answers} | ({OPPONENT: opponent} if opponent else {})


def _key(side: str, question: Question, turn: int) -> str:
    return f"{side}/{question.id}/{turn}"


def _references(pack: Pack) -> dict[str, tuple[str, ...]]:
    if "references" not in pack.files:
        return {}
    items = read_items(pack.files["references"], mt_bench_answer).values()
    return {item.id: item.turns for item in items}


def _prompts(pack: Pack) -> dict[str, Prompt]:
    if "judge" not in pack.files:
        raise FPOError(
            f"pack {pack.name!r} has no judge's prompts: put FastChat's judge_prompts.jsonl into "
            f"{pack.folder}, or add it to pack.yaml under the role judge"
        )
    return read_mt_bench_prompts(pack.files["judge"])
