"""The two answers of a row and which one is preferred, from every shape that compares answers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_core.data.conversations.fields import Fields
from fpo_core.data.conversations.messages import text_list
from fpo_core.data.conversations.model import ASSISTANT, USER
from fpo_core.data.drops import Unusable

# Columns that name the preferred and the other answer.
NAMED = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("chosen_answer", "rejected_answer"),
    ("preferred_output", "non_preferred_output"),
    ("preferred", "dispreferred"),
)
# ms-swift names the rejected answer only; the preferred one is where a dialogue has its answer.
SWIFT = (
    ("messages", "rejected_messages"),
    ("messages", "rejected_response"),
    ("response", "rejected_response"),
)
# Columns of scores, which a preferred answer has the larger one of.
_SCORES = ("score_{}", "{}_score", "{}-score", "rating_{}", "{}_rating", "{}-rating")
_SCORES += ("{}_avg_rating",)

# Columns that judge one answer, as KTO's data has them, and columns of such answers.
LABELS = ("label", "kto_tag")
_JUDGED = ("completion", "response", "output", "messages", "conversations", "conversation")

Sides = tuple[Any, Any]  # the chosen and the rejected value, as the row has them


class Comparison(NamedTuple):
    """Two answer columns and the column that says which is preferred."""

    first: str
    second: str
    verdict: str
    # 0 or 1: which is preferred; None: neither. Raises ValueError for what is no verdict.
    decide: Callable[[Any], int | None]


def find_sides(fields: Fields, pairs_per_prompt: int) -> list[Sides]:
    """Return the comparisons of a row.

    Args:
        fields: the row.
        pairs_per_prompt: most pairs made from a ranking.

    Raises:
        Unusable: the row compares no two answers; the detail says which mapping would do it.
    """
    for names in SWIFT:
        if all(name in fields for name in names):
            return [_swift(fields, names)]
    for names in NAMED:
        if names[0] in fields or names[1] in fields:
            return [_named(fields, names)]
    for comparison in COMPARISONS:
        if all(name in fields for name in comparison[:3]):
            return [_compared(fields, comparison)]
    ranked = _ranking(fields)
    if ranked is not None:
        return _pairs_of_ranking(ranked, pairs_per_prompt)
    output = fields.peek("output")
    if _is_list(output) and len(output) == 2 and "instruction" in fields:
        return [tuple(fields.take("output"))]
    raise Unusable("shape", _hint(fields))


def _named(fields: Fields, names: tuple[str, str]) -> Sides:
    for name in names:
        if name not in fields:
            raise Unusable("no_answer", f"the row has no {name!r}. It has {_have(fields)}")
    chosen, rejected = (fields.take(name) for name in names)
    _note_scores(fields)
    for name in ("response", "output"):  # rm-static repeats the chosen answer
        if name in fields and fields.peek(name) == chosen:
            fields.take(name)
    return chosen, rejected


def _swift(fields: Fields, names: tuple[str, str]) -> Sides:
    chosen, rejected = (fields.take(name) for name in names)
    if names == ("messages", "rejected_response") and isinstance(rejected, str):
        asked = chosen[:-1] if _is_list(chosen) else []
        rejected = [*asked, {"role": ASSISTANT, "content": rejected}]
    return chosen, rejected


def _note_scores(fields: Fields) -> None:
    """Note where the scores of the two answers contradict their order."""
    for form in _SCORES:
        names = [form.format(side) for side in ("chosen", "rejected")]
        scores = [_number(fields.peek(name)) for name in names]
        if form == _SCORES[0]:
            for name in names:
                fields.take(name)
        if scores[0] is None or scores[1] is None:
            continue
        if scores[0] < scores[1]:
            fields.notes.add("scores_reversed")
        elif scores[0] == scores[1]:
            fields.notes.add("scores_tied")


def _compared(fields: Fields, comparison: Comparison) -> Sides:
    answers = [fields.take(comparison.first), fields.take(comparison.second)]
    verdict = fields.take(comparison.verdict)
    told = f"{comparison.verdict}={verdict!r}"
    try:
        preferred = comparison.decide(verdict)
    except ValueError as error:
        raise Unusable("shape", f"{told} does not say which answer is preferred: {error}") from None
    if comparison.verdict == "winner_model_a":
        fields.take("winner_model_b")
        if _number(fields.take("winner_tie")):  # a tie has 0 for both models
            preferred = None
    if preferred is None:
        raise Unusable("no_preference", f"{told} prefers neither answer")
    answers = _with_questions(fields, answers)
    return answers[preferred], answers[1 - preferred]


def _with_questions(fields: Fields, answers: list[Any]) -> list[Any]:
    """Return dialogues where prompt and answers are lists with a text per round."""
    asked = text_list(fields.peek("prompt"))
    said = [text_list(answer) for answer in answers]
    if asked is None or any(each is None or len(each) != len(asked) for each in said):
        return answers
    fields.take("prompt")
    return [
        [
            {"role": role, "content": text}
            for question, answer in zip(asked, each or [], strict=True)
            for role, text in ((USER, question), (ASSISTANT, answer))
        ]
        for each in said
    ]


def _number(value: Any) -> float | None:
    """Return a number, which CSV files hold as text; None for anything else and for NaN."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) else None
    except (ValueError, OverflowError):
        return None
    return None if number != number else number


def _by_sign(verdict: Any) -> int | None:
    number = _number(verdict)
    if number is None:
        if isinstance(verdict, float):  # pandas writes NaN for a missing verdict
            return None
        raise ValueError("expected a number below or above 0")
    return None if number == 0 else 0 if number < 0 else 1


def _by_index(verdict: Any) -> int | None:
    number = _number(verdict)
    if number == -1:  # no verdict
        return None
    if number not in (0, 1):
        raise ValueError("expected 0 or 1")
    return int(number)


def _by_one_for_first(verdict: Any) -> int | None:
    number = _number(verdict)
    if number not in (0, 1):
        raise ValueError("expected 1 or 0")
    return 1 - int(number)


def _by_name(verdict: Any) -> int | None:
    name = _verdict_name(verdict)
    if name in _NEITHER or name.startswith("tie"):
        return None
    if name not in ("a", "b"):
        raise ValueError("expected model_a, model_b or tie")
    return "ab".index(name)


def _verdict_name(verdict: Any) -> str:
    name = str(verdict).strip().lower().replace(" ", "_")
    for prefix in ("model_", "response_", "assistant_", "answer_"):
        name = name.removeprefix(prefix)
    return name


_NEITHER = ("", "both", "both_bad", "bothbad", "neither", "none", "equal", "draw", "nan")


COMPARISONS = (
    Comparison("response_1", "response_2", "preference_strength", _by_sign),  # HelpSteer2
    Comparison("response1", "response2", "overall_preference", _by_sign),  # HelpSteer3
    Comparison("response_0", "response_1", "better_response_id", _by_index),  # PKU-SafeRLHF
    Comparison("conversation_a", "conversation_b", "winner", _by_name),  # arena votes
    Comparison("response_a", "response_b", "winner", _by_name),
    Comparison("response_a", "response_b", "preference", _by_name),
    Comparison("response_a", "response_b", "winner_model_a", _by_one_for_first),
    Comparison("human_ref_a", "human_ref_b", "labels", _by_one_for_first),  # SHP
)


class _Ranked(NamedTuple):
    answer: Any
    score: float  # larger is better


# Lists of answers with a judgment inside each: column, answer key, judgment key, its sign.
_LISTS = (
    ("answers", "answer", "rank", -1.0),  # Nectar
    ("completions", "response", "overall_score", 1.0),  # UltraFeedback
    ("responses", "response", "score", 1.0),
    ("responses", "text", "score", 1.0),
)
# Lists of answers beside a list of judgments: column, judgments, their sign.
_PARALLEL = (
    ("generations", "ratings", 1.0),
    ("generations", "rating", 1.0),
    ("generations", "scores", 1.0),
    ("responses", "scores", 1.0),
    ("responses", "ratings", 1.0),
    ("responses", "rankings", -1.0),
    ("responses", "ranks", -1.0),
    ("answers", "scores", 1.0),
)


def _ranking(fields: Fields) -> list[_Ranked] | None:
    for column, answer, judgment, sign in _LISTS:
        items = fields.peek(column)
        if _is_list(items) and all(
            isinstance(item, Mapping) and answer in item and judgment in item for item in items
        ):
            fields.take(column)
            fields.used_inside[column] = {answer, judgment}
            return _ranked([item[answer] for item in items], [i[judgment] for i in items], sign)
    for column, judgments, sign in _PARALLEL:
        items, scores = fields.peek(column), fields.peek(judgments)
        if _is_list(items) and _is_list(scores) and len(items) == len(scores):
            fields.take(column)
            fields.take(judgments)
            return _ranked(items, scores, sign)
    return None


def _ranked(answers: Sequence[Any], scores: Sequence[Any], sign: float) -> list[_Ranked]:
    """Return the answers with a judgment, best first; those without one take no part."""
    judged = [
        _Ranked(answer, sign * number)
        for answer, score in zip(answers, scores, strict=True)
        if (number := _number(score)) is not None
    ]
    return sorted(judged, key=lambda item: -item.score)


def _pairs_of_ranking(ranked: list[_Ranked], most: int) -> list[Sides]:
    """Pair the best with the worst first, then narrower gaps; equal judgments make no pair."""
    last = len(ranked) - 1
    gaps = sorted(
        ((first, second) for first in range(last + 1) for second in range(first + 1, last + 1)),
        key=lambda places: (places[0] - places[1], places[0]),
    )
    pairs = [
        (ranked[first].answer, ranked[second].answer)
        for first, second in gaps
        if ranked[first].score > ranked[second].score
    ]
    if not pairs:
        raise Unusable("no_preference", "no two answers of the row differ in their judgment")
    return pairs[:most]


def _hint(fields: Fields) -> str:
    have = _have(fields)
    if fields.first(LABELS) and fields.first(_JUDGED):
        return (
            f"the row judges one answer (KTO), a comparison needs two. It has {have}. Join rows of "
            f"one prompt into pairs, or use them in `sft`"
        )
    if "text" in fields:
        return f"the row is plain text, a comparison needs a prompt and two answers. It has {have}"
    alone = fields.first(("response", "completion", "answer", "output"))
    if alone and isinstance(fields.peek(alone), str):
        return (
            f"the row has one answer ({alone!r}), a comparison needs two. It has {have}. Name both "
            f"in data.columns, join rows of one prompt, or use them in `sft`"
        )
    return (
        f"the row has no two answers with a preference. It has {have}. Say where they are: "
        f"data.columns={{prompt: ..., chosen: ..., rejected: ...}}"
    )


def _have(fields: Fields) -> str:
    return ", ".join(map(repr, fields.names)) or "no fields with a value"


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
