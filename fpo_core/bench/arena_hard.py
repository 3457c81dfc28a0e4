"""Arena-Hard v0.1: a judge compares a model's answers with a baseline's, in both orders.

The rules are those of the authors' ``gen_judgment.py`` and ``show_result.py`` of v0.1
(github.com/lmarena/arena-hard-auto; Li et al. 2024, arXiv:2406.11939): two games a question, the
baseline first and then second; a verdict counts only where all labels in the judge's text are the
same one; without any label the judge is asked to go on, once; a clear win is three battles.

The authors fit Bradley-Terry by a logistic regression. Of two models it has a closed form, the
share of battles won with ties as half (``bradley_terry``), which is computed here: it is exact,
and does not need their optimizer to stop at infinity where one model wins everything.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_core.bench.asked import asked_questions, digest_of, ratio_with_interval
from fpo_core.bench.contents import arena_answer, arena_question, read_items
from fpo_core.bench.model import Answers, JudgeRequest, Question, Reply, Score, Scored
from fpo_core.bench.pack import Pack
from fpo_core.bench.prompts import ARENA_LABELS, ArenaJudge, read_arena_judge
from fpo_core.errors import FPOError

GAMES = (1, 2)  # in the first the opponent is assistant A, in the second the model
CLEAR_WIN = 3  # battles that [[A>>B]] and [[B>>A]] count as
# Of a verdict: what assistant A makes of the battle, and how many battles it is.
VERDICTS = {"A>>B": (1.0, CLEAR_WIN), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1),
            "B>>A": (0.0, CLEAR_WIN)}  # fmt: skip
CONTINUE = "Please go on with your judgment, and end it with the label of your final verdict."
OUTCOMES = {"clear_win": "Clear wins", "win": "Wins", "tie": "Ties", "loss": "Losses",
            "clear_loss": "Clear losses", "unread": "Verdicts not read"}  # fmt: skip
ELO_SCALE = 400.0
# Elo is infinite where every battle of a draw is won; percentiles between draws stop here.
_SURE = 1e-12
_AGAIN = "/again"
# Of a judge that draws its verdicts half of the questions contradict themselves.
WEAK_SHARE = 1 / 3
_LABELS = re.compile(ARENA_LABELS)


class Game(NamedTuple):
    """One verdict."""

    question: Question
    number: int  # 1 or 2
    verdict: str | None  # "A>>B" to "B>>A"; None where it cannot be read
    asked_again: bool

    @property
    def points(self) -> float | None:
        """Of the model: 1, 0.5 or 0."""
        if self.verdict is None:
            return None
        first, _ = VERDICTS[self.verdict]
        return first if self.number == 2 else 1.0 - first

    @property
    def battles(self) -> int:
        """How often it counts."""
        return 0 if self.verdict is None else VERDICTS[self.verdict][1]

    @property
    def outcome(self) -> str:
        """A key of ``OUTCOMES``, as the model sees it."""
        if self.points is None:
            return "unread"
        name = {1.0: "win", 0.5: "tie", 0.0: "loss"}[self.points]
        return f"clear_{name}" if self.battles == CLEAR_WIN else name


class ArenaHard:
    """The rules of Arena-Hard v0.1; also of two models of one's own, head to head."""

    kind = "arena_hard"
    judged = True
    paired = True

    def questions(self, pack: Pack) -> list[Question]:
        """The pack's questions, in its order."""
        items = read_items(pack.files["questions"], arena_question).values()
        return [Question(item.id, item.turns, item.label) for item in items]

    def temperature(self, question: Question) -> float | None:
        """None: the recipe says."""
        del question

    def check(self, pack: Pack, limit: int | None) -> None:
        """Nothing beside what reading the pack checks."""
        del pack, limit

    def baseline(self, pack: Pack) -> Answers | None:
        """The answers of the pack's baseline (gpt-4-0314 of the authors'); None without one.

        Raises:
            FPOError: the file has answers of more than one model.
        """
        if "baseline" not in pack.files:
            return None
        items = read_items(pack.files["baseline"], arena_answer).values()
        models = sorted({item.label or "baseline" for item in items})
        if len(models) > 1:
            raise FPOError(
                f"{pack.files['baseline']}: answers of {len(models)} models "
                f"({', '.join(models[:3])}); a baseline is one model"
            )
        return Answers(models[0], {item.id: item.turns for item in items})

    def template_digest(self, pack: Pack) -> str:
        """sha256 over the judge's prompts, its settings and the rules of verdicts."""
        return digest_of([_judge(pack).model_dump(), CONTINUE, VERDICTS])

    def requests(
        self, pack: Pack, answers: Answers, opponent: Answers | None, limit: int | None = None
    ) -> list[JudgeRequest]:
        """Both games of every question; ``ID/1`` and ``ID/2`` are their keys.

        Args:
            pack: questions and judge's prompts.
            answers: the model's.
            opponent: whom it is compared with; the pack's baseline where left out.
            limit: the first questions only.

        Raises:
            FPOError: no judge's prompts, no opponent, answers that do not match the questions.
        """
        judge = _judge(pack)
        opponent = self._opponent(pack, opponent)
        requests = []
        for question in asked_questions(self.questions(pack), limit, answers, opponent):
            model, other = answers.turns[question.id][0], opponent.turns[question.id][0]
            for game in GAMES:
                first, second = (other, model) if game == 1 else (model, other)
                texts = {"question_1": question.turns[0], "answer_1": first, "answer_2": second}
                users = [("user", one.format(**texts)) for one in judge.prompt_template]
                messages = (("system", judge.system_prompt), *users)
                requests.append(
                    JudgeRequest(
                        _key(question, game), messages, judge.max_tokens, judge.temperature
                    )
                )
        return requests

    def follow_ups(
        self, requests: Sequence[JudgeRequest], replies: Mapping[str, Reply]
    ) -> list[JudgeRequest]:
        """Ask to go on, where a first judgment holds no label at all."""
        again = []
        for request in requests:
            reply = replies.get(request.key)
            if reply is None or request.key.endswith(_AGAIN) or _LABELS.search(reply.text):
                continue
            turns = (("assistant", reply.text), ("user", CONTINUE))
            key, messages = request.key + _AGAIN, (*request.messages, *turns)
            again.append(request._replace(key=key, messages=messages))
        return again

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
        """Win rates in percent, and how many verdicts there were of each kind.

        Raises:
            FPOError: no opponent, answers that do not match the questions.
        """
        opponent = self._opponent(pack, opponent)
        asked = asked_questions(self.questions(pack), limit, answers, opponent)
        games = [_game(question, number, replies) for question in asked for number in GAMES]
        read = sum(game.verdict is not None for game in games)
        weighted = _weighted(games, resamples, seed)
        plain = _plain(games, resamples, seed)
        found = [
            Score("win_rate", "Win rate (Arena-Hard)", "%", *weighted, read, len(games)),
            Score("plain_win_rate", "Win rate, unweighted", "%", *plain, read, len(games)),
        ]
        for outcome, label in OUTCOMES.items():
            count = float(sum(game.outcome == outcome for game in games))
            found.append(Score(outcome, label, "verdicts", count, None, None, read, len(games)))
        rows = tuple(_row(game, opponent.model) for game in games)
        return Scored(tuple(found), rows, tuple(_place_note(games)))

    def _opponent(self, pack: Pack, opponent: Answers | None) -> Answers:
        found = opponent or self.baseline(pack)
        if found is None:
            raise FPOError(
                f"pack {pack.name!r} has no baseline's answers: name a second model to compare "
                f"with, or add the file under the role baseline"
            )
        return found


def read_verdict(text: str) -> str | None:
    """The one label in a judgment.

    Returns:
        "A>>B", "A>B", "A=B", "B>A" or "B>>A"; None where there is no label, where there are two
        different ones, and where it is none of the five.
    """
    labels = set(_LABELS.findall(text))
    if len(labels) != 1:
        return None
    (label,) = labels
    return label if label in VERDICTS else None


def bradley_terry(points: np.ndarray) -> float:
    """Win rate of the one model over the other, by Bradley-Terry's model.

    With ratings r and P(win) = 1 / (1 + 10 ** ((r_other - r_model) / 400)), the likelihood of n
    battles, a tie being half a win of each, is largest where P(win) is the mean of the points.

    Args:
        points: of the model in each battle [N]: 1, 0.5 or 0.
    """
    return float(points.mean())


def bradley_terry_interval(points: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """The authors' 95 % bootstrap interval of ``bradley_terry``.

    Battles are drawn with replacement, each copy of a clear win by itself; the percentiles are
    those of the rating, turned into win rates. With 100 resamples and seed 42, as the authors
    have it, the draws are theirs for a file of this one model's judgments in the questions' order.

    Args:
        points: of the model in each battle [N].
        resamples: bootstrap draws.
        seed: of the draws.
    """
    stream, count = np.random.RandomState(seed), len(points)
    rates = np.array([points[stream.choice(count, count)].mean() for _ in range(resamples)])
    rates = rates.clip(_SURE, 1 - _SURE)
    bounds = np.percentile(ELO_SCALE * np.log10(rates / (1 - rates)), [2.5, 97.5])
    low, high = 1 / (1 + 10 ** (-bounds / ELO_SCALE))
    return float(low), float(high)


def _weighted(
    games: list[Game], resamples: int, seed: int
) -> tuple[float, float | None, float | None]:
    """Bradley-Terry's win rate in percent, and its interval."""
    points = np.array([game.points for game in games for _ in range(game.battles)])
    if not len(points):
        return float("nan"), None, None
    low, high = bradley_terry_interval(points, resamples, seed)
    return 100 * bradley_terry(points), 100 * low, 100 * high


def _plain(
    games: list[Game], resamples: int, seed: int
) -> tuple[float, float | None, float | None]:
    """Every verdict once; the interval over questions, whose two games go together."""
    won = np.array([100 * (game.points or 0.0) for game in games]).reshape(-1, len(GAMES))
    read = np.array([game.verdict is not None for game in games]).reshape(-1, len(GAMES))
    return ratio_with_interval(won.sum(1), read.sum(1), resamples, seed)


def _place_note(games: list[Game]) -> Iterator[str]:
    """What the two games of a question tell of the judge: whether it goes by the place."""
    both = [(games[n].points, games[n + 1].points) for n in range(0, len(games), len(GAMES))]
    decided = [pair for pair in both if None not in pair and 0.5 not in pair]
    by_place = sum(first != second for first, second in decided)
    if by_place:
        share = by_place / len(decided)
        weak = " Such a judge is weak: it goes by the place." if share >= WEAK_SHARE else ""
        yield (
            f"In {by_place} of {len(decided)} questions with two decided games the judge preferred "
            f"the same place and not the same answer.{weak}"
        )


def _game(question: Question, number: int, replies: Mapping[str, Reply]) -> Game:
    key = _key(question, number)
    texts = [replies[one].text for one in (key, key + _AGAIN) if one in replies]
    return Game(question, number, read_verdict("\n".join(texts)), len(texts) > 1)


def _row(game: Game, opponent: str) -> dict[str, Any]:
    return {
        "question_id": game.question.id,
        "category": game.question.category,
        "opponent": opponent,
        "game": game.number,
        "verdict": game.verdict,
        "asked_again": game.asked_again,
        "points": game.points,
        "battles": game.battles,
        "outcome": game.outcome,
    }


def _key(question: Question, game: int) -> str:
    return f"{question.id}/{game}"


def _judge(pack: Pack) -> ArenaJudge:
    if "judge" not in pack.files:
        raise FPOError(
            f"pack {pack.name!r} has no judge's prompts: put arena-hard-auto's "
            f"config/judge_config.yaml of v0.1 into {pack.folder} as judge_config.yaml, or add it "
            f"to pack.yaml under the role judge"
        )
    return read_arena_judge(pack.files["judge"])
