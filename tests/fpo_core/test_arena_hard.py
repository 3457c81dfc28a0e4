"""Arena-Hard: verdicts and win rates against computations of their own.

``authors_ratings`` does what the authors' ``show_result.py`` of v0.1 does, by another route than
the code under test: a table of battles, each twice, and a logistic regression.
"""

import math

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression

from fpo_core.bench.arena_hard import (
    VERDICTS,
    ArenaHard,
    bradley_terry,
    bradley_terry_interval,
    read_verdict,
)
from fpo_core.bench.model import Answers, Reply
from fpo_core.bench.pack import load_pack
from fpo_core.errors import FPOError
from tests.fpo_core.packs import ARENA_JUDGE, arena_folder, real_pack

RULES = ArenaHard()
LABELS = list(VERDICTS)
COUNT = 12


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return load_pack(arena_folder(tmp_path_factory.mktemp("arena"), COUNT))


def answered(name, pack, count=None):
    ids = [question.id for question in RULES.questions(pack)][:count]
    return Answers(name, {one: (f"{name} of {one}",) for one in ids})


def judged(requests, verdict):
    """A reply to each request, the label being ``verdict(request)``."""
    return {one.key: Reply(f"Because. [[{verdict(one)}]]", "stop") for one in requests}


def random_verdicts(seed, labels=LABELS):
    drawn = np.random.default_rng(seed)
    return lambda _: str(drawn.choice(labels))


def by_name(scored):
    return {score.name: score for score in scored.scores}


# ---- the authors' computation, by another route


def authors_battles(labels):
    """Labels of (first game, second game) as the authors' table of battles."""
    rows = []
    for first, second in labels:
        for game, label in ((1, first), (2, second)):
            if label is None:
                continue
            better, _, worse = label.replace(">>", ">").partition(">")
            if not worse:
                rows.append("tie")
                continue
            model_is = "B" if game == 1 else "A"
            winner = "model_b" if better == model_is else "model_a"
            rows += [winner] * (3 if ">>" in label else 1)
    return pd.DataFrame({"winner": rows})


def authors_rate(battles):
    """Elo of model B (model A, the baseline, is at 1000), by their logistic regression."""
    both = pd.concat([battles, battles], ignore_index=True)["winner"].to_numpy()
    second_half = np.arange(len(both)) >= len(battles)
    won_by_a = (both == "model_a") | ((both == "tie") & ~second_half)
    if won_by_a.all() or not won_by_a.any():
        return 1000 + (-math.inf if won_by_a.all() else math.inf)
    design = np.tile([math.log(10), -math.log(10)], (len(both), 1))
    fit = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-8).fit(design, won_by_a)
    ratings = 400 * fit.coef_[0] + 1000
    return float(ratings[1] + 1000 - ratings[0])


def to_percent(elo):
    return 100 / (1 + 10 ** ((1000 - elo) / 400))


def interval_of_the_authors(battles, rounds, seed):
    stream = np.random.RandomState(seed)
    drawn = [
        authors_rate(battles.sample(frac=1.0, replace=True, random_state=stream))
        for _ in range(rounds)
    ]
    return [to_percent(bound) for bound in np.percentile(drawn, [2.5, 97.5])]


def test_win_rate_and_interval_are_the_authors(pack):
    """From the same judgments, with their seed and number of draws, up to their optimizer."""
    seed = 42
    answers = answered("mine", pack)
    requests = RULES.requests(pack, answers, None)
    replies = judged(requests, random_verdicts(seed, [*LABELS, "A<B", "A>B]] or [[B>A"]))
    score = by_name(RULES.score(pack, answers, None, replies, resamples=100, seed=seed))["win_rate"]
    pairs = [
        [read_verdict(replies[f"id{number}/{game}"].text) for game in (1, 2)]
        for number in range(COUNT)
    ]
    battles = authors_battles(pairs)
    assert score.value == pytest.approx(to_percent(authors_rate(battles)), abs=1e-5)
    bounds = interval_of_the_authors(battles, 100, seed)
    assert (score.low, score.high) == pytest.approx(tuple(bounds), abs=1e-5)
    read = sum(label is not None for pair in pairs for label in pair)
    assert (score.judged, score.asked) == (read, 2 * COUNT)
    assert read < 2 * COUNT


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40))
def test_the_closed_form_is_the_largest_likelihood(points):
    won = sum(points)

    def loss(logit):  # float64, by scipy
        return won * np.logaddexp(0, -logit) + (len(points) - won) * np.logaddexp(0, logit)

    best = minimize_scalar(loss, bounds=(-30, 30), method="bounded", options={"xatol": 1e-10})
    rate = bradley_terry(np.array(points))
    assert rate == pytest.approx(1 / (1 + math.exp(-best.x)), abs=1e-6)
    assert loss(best.x) >= len(points) * _entropy(rate) - 1e-9


def _entropy(rate):
    return -sum(one * math.log(one) for one in (rate, 1 - rate) if one)


def test_a_model_that_always_wins_has_a_finite_interval():
    assert bradley_terry_interval(np.ones(20), 50, 0) == pytest.approx((1, 1), abs=1e-9)
    low, high = bradley_terry_interval(np.array([1.0] * 19 + [0.0]), 500, 0)
    assert 0.7 < low < 0.95 < high <= 1


def test_a_clear_win_counts_three_times(pack):
    """Five battles by hand: 3 won, 1 lost, 1 tied: 3.5 / 5. Unweighted: 1.5 of 3 verdicts."""
    answers = answered("mine", pack)
    labels = {"id0/1": "B>>A", "id0/2": "B>A", "id1/1": "A=B"}
    replies = {key: Reply(f"[[{label}]]", "stop") for key, label in labels.items()}
    scored = RULES.score(pack, answers, None, replies, resamples=50)
    scores = by_name(scored)
    assert scores["win_rate"].value == pytest.approx(70)
    assert scores["plain_win_rate"].value == pytest.approx(50)
    counts = {name: scores[name].value for name in ("clear_win", "win", "tie", "loss", "unread")}
    assert counts == {"clear_win": 1, "win": 0, "tie": 1, "loss": 1, "unread": 2 * COUNT - 3}
    assert {score.judged for score in scores.values()} == {3}
    rows = {(row["question_id"], row["game"]): row for row in scored.verdicts}
    assert (rows["id0", 1]["points"], rows["id0", 1]["battles"]) == (1.0, 3)
    assert rows["id5", 2] == {
        "question_id": "id5", "category": "made-up", "opponent": "base", "game": 2,
        "verdict": None, "asked_again": False, "points": None, "battles": 0, "outcome": "unread",
    }  # fmt: skip


def test_the_unweighted_rate_draws_questions_with_both_games(pack):
    answers = answered("mine", pack)
    requests = RULES.requests(pack, answers, None)
    replies = judged(requests, random_verdicts(3))
    del replies["id4/2"]
    scored = RULES.score(pack, answers, None, replies, resamples=200, seed=5)
    found = by_name(scored)["plain_win_rate"]
    table = pd.DataFrame(scored.verdicts).dropna(subset="points").astype({"points": float})
    assert found.value == pytest.approx(100 * table["points"].mean())
    ids = [f"id{number}" for number in range(COUNT)]
    of_question = {one: table.loc[table["question_id"] == one, "points"].to_numpy() for one in ids}
    draws = np.random.default_rng(5).integers(0, COUNT, size=(200, COUNT))
    means = [np.concatenate([of_question[ids[row]] for row in draw]).mean() for draw in draws]
    assert (found.low, found.high) == pytest.approx(tuple(100 * np.percentile(means, [2.5, 97.5])))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31))
def test_swapped_models_have_the_other_share(pack, seed):
    """The same judge, whichever of the two is called the model; it is asked nothing new."""
    one, two = answered("one", pack), answered("two", pack)
    forward, backward = RULES.requests(pack, one, two), RULES.requests(pack, two, one)
    assert {request.messages for request in forward} == {request.messages for request in backward}
    said = dict(
        zip(sorted({r.messages for r in forward}), _labels(seed, len(forward)), strict=True)
    )
    scores = [
        by_name(RULES.score(pack, model, other, judged(asked, lambda r: said[r.messages]),
                            resamples=3))
        for model, other, asked in ((one, two, forward), (two, one, backward))
    ]  # fmt: skip
    for name in ("win_rate", "plain_win_rate"):
        assert scores[0][name].value == pytest.approx(100 - scores[1][name].value)
    for name, mirrored in (("clear_win", "clear_loss"), ("win", "loss"), ("tie", "tie")):
        assert scores[0][name].value == scores[1][mirrored].value
        assert scores[0][mirrored].value == scores[1][name].value


def _labels(seed, count):
    return np.random.default_rng(seed).choice(LABELS, count).tolist()


# ---- verdicts


def labels_by_scanning(text):
    """Every [[...]] of the characters A, B, <, =, >, read character by character."""
    found = []
    for start in range(len(text)):
        if text[start : start + 2] != "[[":
            continue
        end = start + 2
        while end < len(text) and text[end] in "AB<>=":
            end += 1
        if end > start + 2 and text[end : end + 2] == "]]":
            found.append(text[start + 2 : end])
    return found


PIECES = st.sampled_from(
    [f"[[{label}]]" for label in LABELS] + ["[", "]", "A", ">", "[[A<B]]", "\n"]
)


@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join))
def test_verdicts_are_read_as_the_authors_do(text):
    found = set(labels_by_scanning(text))
    (only,) = found if len(found) == 1 else (None,)
    assert read_verdict(text) == (only if only in LABELS else None)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("My final verdict is: [[A>>B]]", "A>>B"),
        ("[[B>A]], so again [[B>A]]", "B>A"),
        ("[[A>B]] or rather [[A>>B]]", None),
        ("[[[A=B]]]", "A=B"),
        ("A>B", None),
        ("[[C]]", None),
        ("[[A<B]]", None),
        ("[[A > B]]", None),
        ("", None),
    ],
)
def test_verdicts_by_hand(text, verdict):
    assert read_verdict(text) == verdict


def test_a_judgment_without_a_label_is_asked_for_once_more(pack):
    answers = answered("mine", pack, 3)
    requests = RULES.requests(pack, answers, None, limit=3)
    first = {
        "id0/1": Reply("I would say", "length"),  # cut off
        "id0/2": Reply("[[A>B]] [[B>A]]", "stop"),  # two labels: not asked again
        "id1/1": Reply("[[A>B]]", "stop"),
        "id1/2": Reply("nothing", "stop"),
    }
    again = RULES.follow_ups(requests, first)
    assert [one.key for one in again] == ["id0/1/again", "id1/2/again"]
    asked = requests[0].messages
    assert again[0].messages[: len(asked)] == asked
    assert [role for role, _ in again[0].messages[len(asked) :]] == ["assistant", "user"]
    assert again[0].messages[len(asked)][1] == "I would say"
    replies = {**first, "id0/1/again": Reply("so [[B>>A]]", "stop"),
               "id1/2/again": Reply("no idea", "stop")}  # fmt: skip
    assert RULES.follow_ups([*requests, *again], replies) == again  # no third time
    rows = RULES.score(pack, answers, None, replies, limit=3).verdicts
    found = {f"{row['question_id']}/{row['game']}": row["verdict"] for row in rows}
    assert found == {
        "id0/1": "B>>A", "id0/2": None, "id1/1": "A>B", "id1/2": None, "id2/1": None, "id2/2": None
    }  # fmt: skip
    assert rows[0]["asked_again"]


# ---- what the judge is asked


def test_both_orders_of_the_packs_prompt(pack):
    answers = Answers(
        "mine", {question.id: ("{answer_2} {x}",) for question in RULES.questions(pack)}
    )
    first, second = RULES.requests(pack, answers, None, limit=1)
    assert (first.key, second.key) == ("id0/1", "id0/2")
    assert first.messages == (
        ("system", ARENA_JUDGE["system_prompt"]),
        ("user", "Q: ask id0\nA: base of id0\nB: {answer_2} {x}"),
    )
    assert second.messages[1] == ("user", "Q: ask id0\nA: {answer_2} {x}\nB: base of id0")
    assert (first.max_tokens, first.temperature) == (512, 0)


def test_the_real_pack_asks_a_thousand_games(tmp_path):
    folder = real_pack("arena_hard")
    for name in ("question.jsonl", "gpt-4-0314.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    whole = load_pack(folder)
    with pytest.raises(FPOError, match="put arena-hard-auto's config/judge_config.yaml"):
        RULES.requests(whole, answered("mine", whole), None)
    judge = tmp_path / "judge_config.yaml"
    judge.write_text(yaml.safe_dump(ARENA_JUDGE))
    whole = whole._replace(files={**whole.files, "judge": judge})
    requests = RULES.requests(whole, answered("mine", whole), None)
    assert len({request.key for request in requests}) == 1000
    assert RULES.baseline(whole).model == "gpt-4-0314"


def test_answers_have_to_match_the_questions(pack):
    answers = answered("mine", pack)
    with pytest.raises(FPOError, match=r"answers of 'mine': nothing for 10 of 12 questions"):
        RULES.requests(pack, answered("mine", pack, 2), None)
    more = Answers("mine", {**answers.turns, "x": ("a",)})
    with pytest.raises(FPOError, match=r"1 for no question \('x'\)"):
        RULES.score(pack, more, None, {})
    two = Answers("mine", {**answers.turns, "id3": ("a", "b")})
    with pytest.raises(FPOError, match="question 'id3' has 1 turns, 2 are answered"):
        RULES.requests(pack, two, None)
    assert len(RULES.requests(pack, answered("mine", pack, 2), None, limit=2)) == 4
    assert len(RULES.requests(pack, answers, None, limit=2)) == 4


def test_without_a_baseline_a_second_model_is_needed(pack):
    files = {role: file for role, file in pack.files.items() if role != "baseline"}
    alone = pack._replace(files=files)
    answers = answered("mine", pack)
    assert RULES.baseline(alone) is None
    with pytest.raises(FPOError, match="has no baseline's answers: name a second model"):
        RULES.requests(alone, answers, None)
    assert len(RULES.requests(alone, answers, answered("other", pack))) == 2 * COUNT


def test_without_a_verdict_there_is_no_figure(pack):
    scores = by_name(RULES.score(pack, answered("mine", pack), None, {}))
    assert math.isnan(scores["win_rate"].value)
    assert math.isnan(scores["plain_win_rate"].value)
    assert (scores["win_rate"].low, scores["win_rate"].judged) == (None, 0)
    assert scores["unread"].value == scores["unread"].asked == 2 * COUNT


def test_the_template_digest_follows_the_judges_words(pack, tmp_path):
    before = RULES.template_digest(pack)
    for changed, same in (({"judge_model": "x"}, True), ({"system_prompt": "y"}, False),
                          ({"temperature": 0.5}, False)):  # fmt: skip
        judge = tmp_path / "judge.yaml"
        judge.write_text(yaml.safe_dump({**ARENA_JUDGE, **changed}))
        other = pack._replace(files={**pack.files, "judge": judge})
        assert (RULES.template_digest(other) == before) is same


def test_a_judge_that_goes_by_the_place_is_called_weak(pack):
    answers, other = answered("m", pack), answered("o", pack)
    requests = RULES.requests(pack, answers, other)
    by_place = RULES.score(pack, answers, other, judged(requests, lambda _: "A>B"))
    assert by_place.notes == (
        f"In {COUNT} of {COUNT} questions with two decided games the judge preferred the same "
        f"place and not the same answer. Such a judge is weak: it goes by the place.",
    )
    one = requests[0].key  # the model is B there: once it loses both games
    mostly = judged(requests, lambda r: "A>B" if r.key.endswith("/1") else "B>A")
    assert RULES.score(pack, answers, other, mostly).notes == ()
    mostly[one] = Reply("[[B>A]]", "stop")
    (note,) = RULES.score(pack, answers, other, mostly).notes
    assert note.startswith(f"In 1 of {COUNT} ")
    assert "weak" not in note
    tied = judged(requests, lambda _: "A=B")
    assert RULES.score(pack, answers, other, tied).notes == ()
