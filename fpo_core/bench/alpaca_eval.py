"""AlpacaEval 2: how probable a judge finds it that the policy's output beats the baseline's.

The rules are those of ``weighted_alpaca_eval_gpt4_turbo`` in the package ``alpaca-eval`` (Dubois et
al., 2024): one token is asked for, and the preference is read from the log-probs of its two labels.
Which output comes first is drawn by a seed made of the instruction alone, as the package does it:
judgments can be kept and compared. Nothing is guessed: a reply without log-probs of a label is
unparsable for the package, and is so here.
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fpo_core.bench.alpaca_package import Evaluator, alpaca_metrics, read_evaluator
from fpo_core.bench.asked import asked_questions
from fpo_core.bench.length_control import OFFICIAL, length_controlled
from fpo_core.bench.model import Answers, JudgeRequest, Question, Reply, Score, Scored
from fpo_core.bench.pack import Pack
from fpo_core.data.sources import Row, read_sound_rows
from fpo_core.errors import FPOError

BASELINE = "gpt4_1106_preview"  # the leaderboard's
# sha256 over the 805 instructions in their official order, each followed by a zero byte: their
# difficulties are known by position.
INSTRUCTIONS = "19335c314b25f2550db9138cbbc7c1219ac28967bd6062cd323182405afbd7f1"
NUM_INSTRUCTIONS = 805
NORMAL_95 = 1.959964


class _Pair(NamedTuple):
    """Two outputs to compare."""

    question: Question
    policy: str
    baseline: str

    @property
    def policy_first(self) -> bool:
        """The package's draw: its processor's column name, the instruction and its seed, 0."""
        seed = f"is_switched_outputs{self.question.turns[0]}0"
        return random.Random(seed).choices([False, True])[0]  # noqa: S311 - an order, no secret

    @property
    def key(self) -> str:
        order = "policy-first" if self.policy_first else "baseline-first"
        return f"{self.question.id}:{order}"

    def request(self, evaluator: Evaluator) -> JudgeRequest:
        first, second = self.baseline, self.policy
        if self.policy_first:
            first, second = second, first
        messages = evaluator.fill(self.question.turns[0], first, second)
        return JudgeRequest(
            self.key, messages, evaluator.max_tokens, evaluator.temperature, evaluator.top_logprobs
        )


class AlpacaEval:
    """The rules of AlpacaEval 2.

    A pack's ``questions`` and ``baseline`` are JSON or JSONL rows with ``instruction``, and
    ``output`` and ``generator``; ``gamed`` is the package's ``df_gamed.csv``, which the
    leaderboard's length-controlled win rate needs.
    """

    kind = "alpaca_eval"
    judged = True
    paired = True

    def questions(self, pack: Pack) -> list[Question]:
        """The pack's questions, in its order; ids are made of position and text.

        Raises:
            FPOError: no instruction, or one that comes twice (outputs are joined by instruction).
        """
        texts = _instructions(pack.files["questions"])
        return [
            Question(
                f"{number:03d}-{hashlib.sha256(text.encode()).hexdigest()[:10]}",
                (text,),
                str(row.value.get("dataset") or ""),
            )
            for number, (text, row) in enumerate(texts.items())
        ]

    def temperature(self, question: Question) -> float | None:
        """None: the recipe says."""
        del question

    def check(self, pack: Pack, limit: int | None) -> None:
        """Nothing beside what reading the pack checks."""
        del pack, limit

    def baseline(self, pack: Pack) -> Answers | None:
        """The pack's baseline outputs, joined to its questions by instruction.

        Raises:
            FPOError: not one output for each question, or outputs of several generators.
        """
        if "baseline" not in pack.files:
            return None
        path = pack.files["baseline"]
        rows = _instructions(path)
        ids = {question.turns[0]: question.id for question in self.questions(pack)}
        outputs = {
            ids.get(text, f"({row.where})"): (_text(row, "output", empty=True),)
            for text, row in rows.items()
        }
        models = {_text(row, "generator") for row in rows.values()}
        if len(models) > 1:
            raise FPOError(
                f"{path}: outputs of several generators ({', '.join(sorted(models))}): a baseline "
                f"is one model; keep a file for each"
            )
        answers = Answers(models.pop(), outputs)
        asked_questions(self.questions(pack), None, answers)
        return answers

    def template_digest(self, pack: Pack) -> str:
        """sha256 over the package's prompt, its settings and the tokens that are read."""
        del pack  # the prompt is the package's
        return read_evaluator().digest

    def requests(
        self, pack: Pack, answers: Answers, opponent: Answers | None, limit: int | None = None
    ) -> list[JudgeRequest]:
        """One comparison a question; equal outputs are a draw without asking."""
        evaluator = read_evaluator()
        pairs, _ = self._pairs(pack, answers, opponent, limit)
        return [pair.request(evaluator) for pair in pairs if pair.policy != pair.baseline]

    def follow_ups(
        self, requests: Sequence[JudgeRequest], replies: Mapping[str, Reply]
    ) -> list[JudgeRequest]:
        """None: the package asks once."""
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
        """Win rate, length-controlled win rate and mean lengths, against opponent or baseline.

        Args:
            pack: the instructions, and the baseline where there is no opponent.
            answers: the policy's.
            opponent: another model's; None: the pack's baseline.
            replies: by request key; what is missing counts as not judged.
            limit: only the first so many instructions.
            resamples: of the bootstrap for the length-controlled rate.
            seed: of that bootstrap.

        Raises:
            FPOError: answers that do not fit the questions; no baseline; a package that is missing.
        """
        pairs, rival = self._pairs(pack, answers, opponent, limit)
        verdicts = tuple(_verdict(pair, replies.get(pair.key)) for pair in pairs)
        win_rate = _win_rate(verdicts)
        lengths = [_mean_length(answers.model, "", verdicts, "length")]
        lengths.append(_mean_length(rival, "_opponent", verdicts, "length_opponent"))
        gamed, unlike = self._leaderboard(pack, rival if opponent is None else None, len(pairs))
        notes = _not_read(verdicts)
        try:
            controlled = _controlled(verdicts, win_rate, gamed, unlike, resamples, seed)
        except ValueError as error:
            notes.append(f"no length-controlled win rate: {error}")
            return Scored((win_rate, *lengths), verdicts, tuple(notes))
        if unlike:
            notes.append(
                f"the length-controlled win rate is not the leaderboard's: {'; '.join(unlike)}"
            )
        return Scored((win_rate, controlled, *lengths), verdicts, tuple(notes))

    def _pairs(
        self, pack: Pack, answers: Answers, opponent: Answers | None, limit: int | None
    ) -> tuple[list[_Pair], str]:
        """The pairs to compare, and the name of the other side."""
        other = opponent or self.baseline(pack)
        if other is None:
            raise FPOError(
                f"pack {pack.name!r} has no baseline outputs: name an opponent, or add the file "
                f"with the role 'baseline'"
            )
        pairs = [
            _Pair(question, answers.turns[question.id][0], other.turns[question.id][0])
            for question in asked_questions(self.questions(pack), limit, answers, other)
        ]
        return pairs, other.model

    def _leaderboard(
        self, pack: Pack, baseline: str | None, num_pairs: int
    ) -> tuple[Path | None, list[str]]:
        """The gamed annotations, where they apply, and what differs from the leaderboard."""
        digest = hashlib.sha256()
        for question in self.questions(pack):
            digest.update(question.turns[0].encode() + b"\0")
        unlike = []
        gamed = pack.files.get("gamed")
        if digest.hexdigest() != INSTRUCTIONS:
            gamed = None
            unlike.append("the instructions are not the official ones, so have no known difficulty")
        elif gamed is None:
            unlike.append("the pack has no file 'gamed', so no instruction difficulty")
        if num_pairs < NUM_INSTRUCTIONS:
            unlike.append(f"it is fitted on {num_pairs} instructions, not on {NUM_INSTRUCTIONS}")
        if baseline != BASELINE:
            unlike.append(f"the other side is not {BASELINE}")
        return gamed, unlike


def _instructions(path: Path) -> dict[str, Row]:
    """The rows of a file by their instruction."""
    rows: dict[str, Row] = {}
    for row in read_sound_rows(path):
        text = _text(row, "instruction")
        if text in rows:
            raise FPOError(
                f"{row.where}: the same instruction as {rows[text].where}: AlpacaEval joins "
                f"outputs by instruction, so each may come once"
            )
        rows[text] = row
    return rows


def _text(row: Row, key: str, *, empty: bool = False) -> str:
    value = row.value.get(key)
    if not isinstance(value, str) or not (value or empty):
        raise FPOError(f"{row.where}: {key!r} has to be text, this is {value!r}")
    return value


def first_probability(reply: Reply, evaluator: Evaluator) -> float | None:
    """The probability of the label of the first output among both labels.

    Returns:
        p in [0, 1], 0 where only the other label is among the likeliest tokens; None where neither
        is, or the reply has not exactly one token with log-probs (then the package drops it).
    """
    if len(reply.top_logprobs) != 1:
        return None
    logprobs = {
        token: logprob for token, logprob in reply.top_logprobs[0] if token in evaluator.labels
    }
    highest = max(logprobs.values(), default=-math.inf)
    if not math.isfinite(highest):
        return None
    weights = {token: math.exp(logprob - highest) for token, logprob in logprobs.items()}
    return weights.get(evaluator.first, 0.0) / math.fsum(weights.values())


def _verdict(pair: _Pair, reply: Reply | None) -> dict[str, Any]:
    preference = None
    if pair.policy == pair.baseline:
        status, preference = "equal", 0.5
    elif reply is None:
        status = "missing"
    else:
        first = first_probability(reply, read_evaluator())
        status = "unparsable" if first is None else "judged"
        if first is not None:
            preference = first if pair.policy_first else 1 - first
    return {
        "question": pair.question.id,
        "category": pair.question.category,
        "policy_first": pair.policy_first,
        "status": status,
        "preference": preference,  # for the policy
        "reply": None if reply is None else reply.text,
        "length": len(pair.policy),
        "length_opponent": len(pair.baseline),
    }


def _preferences(verdicts: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([row["preference"] for row in verdicts], dtype=np.float64)  # None is NaN


def _win_rate(verdicts: Sequence[dict[str, Any]]) -> Score:
    """The package's win rate, with the normal interval of its standard error."""
    winrate, _ = alpaca_metrics()
    known = _preferences(verdicts)
    known = known[~np.isnan(known)]
    value, low, high = math.nan, None, None
    if len(known):
        figures = winrate.get_winrate([{"preference": 1 + share} for share in known.tolist()])
        value, half = float(figures["win_rate"]), NORMAL_95 * float(figures["standard_error"])
        if math.isfinite(half):  # one verdict has no standard error
            low, high = max(value - half, 0.0), min(value + half, 100.0)
    return Score("win_rate", "Win rate", "%", value, low, high, len(known), len(verdicts))


def _controlled(
    verdicts: Sequence[dict[str, Any]],
    win_rate: Score,
    gamed: Path | None,
    unlike: list[str],
    resamples: int,
    seed: int,
) -> Score:
    excess = np.array([row["length_opponent"] - row["length"] for row in verdicts], dtype=float)
    fitted = length_controlled(_preferences(verdicts), excess, gamed, resamples, seed)
    label = "Length-controlled win rate"
    if fitted.rule != OFFICIAL:
        label += " (no instruction difficulty)"
    elif unlike:
        label += " (not the leaderboard's setting)"
    return win_rate._replace(
        name="lc_win_rate", label=label, value=fitted.value, low=fitted.low, high=fitted.high
    )


def _mean_length(model: str, suffix: str, verdicts: Sequence[dict[str, Any]], key: str) -> Score:
    mean = float(np.mean([row[key] for row in verdicts]))
    label = f"Mean length of {model}'s outputs"
    count = len(verdicts)
    return Score(f"mean_length{suffix}", label, "characters", mean, None, None, count, count)


def _not_read(verdicts: Sequence[dict[str, Any]]) -> list[str]:
    """A note where replies could not be read."""
    count = sum(row["status"] == "unparsable" for row in verdicts)
    if not count:
        return []
    bare = " (does the endpoint give log-probs?)" if count == len(verdicts) else ""
    return [f"{count} of {len(verdicts)} replies have no log-prob of a label{bare}"]
