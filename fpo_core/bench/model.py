"""What a benchmark is made of: questions, answers, what a judge is asked, and scores.

A benchmark is a set of pure functions over these (``Benchmark``): it never talks to a judge, never
reads a model. Who runs it asks the judge for ``requests`` and hands the replies to ``score``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from fpo_core.bench.pack import Pack


class Question(NamedTuple):
    """One question of a benchmark."""

    id: str
    turns: tuple[str, ...]  # the user's; MT-Bench has two
    category: str = ""


class Answers(NamedTuple):
    """One model's answers to a benchmark's questions."""

    model: str  # as it is shown: "policy", "reference", or the baseline's name
    turns: Mapping[str, tuple[str, ...]]  # by question id, one for each of its turns


class JudgeRequest(NamedTuple):
    """One question to a judge; equal requests are asked once."""

    key: str  # unique among a benchmark's requests: says which question, order and turn
    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int
    temperature: float
    top_logprobs: int = 0  # alternatives wanted with each token; 0: none


class Reply(NamedTuple):
    """What a judge answered."""

    text: str
    finish: str  # "stop" or "length", as the endpoint says
    # For each token of the reply: its likeliest tokens with their log-probs, where asked for.
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...] = ()
    prompt_tokens: int | None = None
    reply_tokens: int | None = None


class Score(NamedTuple):
    """One figure of a benchmark, with its 95 % interval where it has one."""

    name: str  # "win_rate", "lc_win_rate", "rating", "prompt_strict", …
    label: str
    unit: str  # "%", "points", "share", or "verdicts" where they are counted
    value: float
    low: float | None
    high: float | None
    judged: int  # verdicts that could be read
    asked: int  # verdicts that were wanted


class Scored(NamedTuple):
    """The outcome of a benchmark: its figures, and what they were computed from."""

    scores: tuple[Score, ...]
    verdicts: tuple[dict[str, Any], ...]  # one flat row a verdict, all with the same keys
    notes: tuple[str, ...] = ()  # what a reader of the figures has to know, a sentence each


class Benchmark(Protocol):
    """The rules of one kind of benchmark."""

    kind: str
    judged: bool  # whether it needs a judge
    paired: bool  # whether an opponent is needed (win rates); False: models are rated alone

    def questions(self, pack: Pack) -> list[Question]:
        """The pack's questions, in its order."""
        ...

    def temperature(self, question: Question) -> float | None:
        """What the authors sample a question's answers at; None where they leave it open."""
        ...

    def check(self, pack: Pack, limit: int | None) -> None:
        """Refuse what would stop ``score`` and can be told before anything is answered."""
        ...

    def baseline(self, pack: Pack) -> Answers | None:
        """The answers of the benchmark's own baseline; None where it has none."""
        ...

    def template_digest(self, pack: Pack) -> str:
        """sha256 over the judge's prompts and rules; part of every score's key."""
        ...

    def requests(
        self, pack: Pack, answers: Answers, opponent: Answers | None, limit: int | None = None
    ) -> list[JudgeRequest]:
        """What a judge is to be asked; on the first ``limit`` questions."""
        ...

    def follow_ups(
        self, requests: Sequence[JudgeRequest], replies: Mapping[str, Reply]
    ) -> list[JudgeRequest]:
        """What to ask after these replies (a verdict that is missing, asked for once more)."""
        ...

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
        """The figures, from the replies by request key; what has no reply counts as not judged."""
        ...
