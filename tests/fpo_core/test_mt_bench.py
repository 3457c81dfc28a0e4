"""MT-Bench: prompts as FastChat fills them in, ratings as it reads them, means by another route."""

import ast
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_core.bench.model import Answers, Question, Reply
from fpo_core.bench.mt_bench import MtBench, read_rating
from fpo_core.bench.pack import load_pack
from fpo_core.errors import FPOError
from tests.fpo_core.packs import mt_bench_folder, real_pack

RULES = MtBench()
CATEGORIES = ("writing", "math", "coding", "stem", "reasoning", "writing")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return load_pack(mt_bench_folder(tmp_path_factory.mktemp("mt"), CATEGORIES))


def answered(name, pack, count=None):
    ids = [question.id for question in RULES.questions(pack)][:count]
    return Answers(name, {one: (f"{name} {one}.1", f"{name} {one}.2") for one in ids})


def rated(requests, seed, unread=()):
    """Random ratings as the judge would write them."""
    drawn = np.random.default_rng(seed)
    texts = {one.key: f"Good. Rating: [[{drawn.integers(10, 101) / 10}]]" for one in requests}
    return {
        key: Reply("no rating" if key in unread else text, "stop") for key, text in texts.items()
    }


def by_name(scored):
    return {score.name: score for score in scored.scores}


def test_each_category_has_fastchats_temperature():
    """As ``temperature_config`` in ``fastchat/llm_judge/common.py`` has them."""
    wanted = {0.7: ("writing", "roleplay", "of one's own"), 0.1: ("stem", "humanities"),
              0.0: ("extraction", "math", "coding", "reasoning")}  # fmt: skip
    for temperature, categories in wanted.items():
        for category in categories:
            assert RULES.temperature(Question("1", ("a", "b"), category)) == temperature


# ---- ratings


def numbers_by_scanning(text, brackets):
    """Numbers inside so many brackets, read character by character."""
    found = []
    for start in range(len(text)):
        if text[start : start + brackets] != "[" * brackets:
            continue
        end = start + brackets
        digits = 0
        while end < len(text) and text[end] in "0123456789":
            end, digits = end + 1, digits + 1
        if digits and end < len(text) and text[end] == ".":
            end += 1
            while end < len(text) and text[end] in "0123456789":
                end += 1
        if digits and text[end : end + brackets] == "]" * brackets:
            found.append(text[start + brackets : end])
    return found


NUMBERS = st.sampled_from(["7", "10", "8.5", "0", "5.", "100", ".5", "1,2", "x"])
PIECES = st.one_of(
    NUMBERS.map(lambda number: f"[[{number}]]"), NUMBERS.map(lambda number: f"[{number}]"),
    st.sampled_from(["[", "]", "[[", "]]", "3", ".", " ", "\n"]), st.text(max_size=3),
)  # fmt: skip


@given(st.lists(PIECES, max_size=8).map("".join))
def test_ratings_are_read_as_fastchat_does(text):
    """The first in double brackets, else the first in single ones; as Python reads the number."""
    found = numbers_by_scanning(text, 2) or numbers_by_scanning(text, 1)
    if not found:
        assert read_rating(text) is None
    elif found[0] == "0" or not found[0].startswith("0"):
        assert read_rating(text) == ast.literal_eval(found[0])


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[5]]", 5.0),
        ("[[7.5]] or [[9]]", 7.5),
        ("as in [1], so [[8]]", 8.0),
        ("Rating: [6]", 6.0),
        ("[[rating]] 7", None),
        ("[[7/10]]", None),
        ("[[-3]]", None),
        ("[[٥]]", None),
        ("7", None),
        ("", None),
    ],
)
def test_ratings_by_hand(text, rating):
    assert read_rating(text) == rating


# ---- what the judge is asked


def test_prompts_of_both_turns_with_and_without_a_reference(pack):
    asked = {one.key: one for one in RULES.requests(pack, answered("mine", pack), None, limit=2)}
    assert list(asked) == ["model/81/1", "model/81/2", "model/82/1", "model/82/2"]
    filled = {key: one.messages for key, one in asked.items()}
    assert filled == {
        "model/81/1": (("system", "system of single-v1"), ("user", "Rate mine 81.1 to q81.1")),
        "model/81/2": (
            ("system", "system of single-v1-multi-turn"),
            ("user", "q81.1 mine 81.1 q81.2 rate mine 81.2"),
        ),
        "model/82/1": (
            ("system", "system of single-math-v1"),
            ("user", "Rate mine 82.1 to q82.1; right is r.1"),
        ),
        "model/82/2": (
            ("system", "system of single-math-v1-multi-turn"),
            ("user", "q82.1 (r.1) mine 82.1 q82.2 (r.2) rate mine 82.2"),
        ),
    }
    assert {(one.temperature, one.max_tokens) for one in asked.values()} == {(0.0, 2048)}
    assert RULES.follow_ups(list(asked.values()), {"model/81/1": Reply("none", "stop")}) == []


def test_the_real_pack_is_asked_with_its_own_prompts():
    """Each prompt holds the question, the answer and, of the right categories, the reference."""
    folder = real_pack("mt_bench")
    real = load_pack(folder)
    rows = [json.loads(line) for line in (folder / "judge_prompts.jsonl").read_text().splitlines()]
    templates = {row["name"]: row for row in rows}
    references = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in map(json.loads, (folder / "reference_answer_gpt-4.jsonl").open())
    }
    answers = answered("mine", real)
    asked = {one.key: one.messages for one in RULES.requests(real, answers, None)}
    assert len(asked) == 160
    for row in map(json.loads, (folder / "question.jsonl").open()):
        one, mine = row["question_id"], answers.turns[str(row["question_id"])]
        name = "single-math-v1" if one in references else "single-v1"
        ref = {f"ref_answer_{turn}": text for turn, text in enumerate(references.get(one, ()), 1)}
        first = templates[name]["prompt_template"].format(
            question=row["turns"][0], answer=mine[0], **ref
        )
        second = templates[f"{name}-multi-turn"]["prompt_template"].format(
            question_1=row["turns"][0], answer_1=mine[0], question_2=row["turns"][1],
            answer_2=mine[1], **ref,
        )  # fmt: skip
        assert asked[f"model/{one}/1"][1] == ("user", first)
        assert asked[f"model/{one}/2"][1] == ("user", second)
        assert asked[f"model/{one}/1"][0] == ("system", templates[name]["system_prompt"])


# ---- scores


def test_means_and_intervals_over_questions(pack):
    """Against pandas: FastChat's mean over all ratings that could be read, by turn, by category."""
    answers = answered("mine", pack)
    replies = rated(RULES.requests(pack, answers, None), 1, unread=("model/83/2", "model/84/1"))
    del replies["model/85/1"]
    scored = RULES.score(pack, answers, None, replies, resamples=60, seed=9)
    scores = by_name(scored)
    table = pd.DataFrame(scored.verdicts)
    read = table.dropna(subset="rating")
    assert scores["rating"].value == pytest.approx(read["rating"].mean())
    assert (scores["rating"].judged, scores["rating"].asked) == (9, 12)
    for turn, mean in read.groupby("turn")["rating"].mean().items():
        assert scores[f"rating_turn_{turn}"].value == pytest.approx(mean)
    for category, mean in read.groupby("category")["rating"].mean().items():
        assert scores[f"rating_{category}"].value == pytest.approx(mean)
    assert scores["rating_math"].asked == 2
    ids = list(dict.fromkeys(table["question_id"]))
    draws = np.random.default_rng(9).integers(0, len(ids), size=(60, len(ids)))
    means = [
        pd.concat([read[read["question_id"] == ids[row]] for row in draw])["rating"].mean()
        for draw in draws
    ]
    bounds = np.percentile(means, [2.5, 97.5])
    assert (scores["rating"].low, scores["rating"].high) == pytest.approx(tuple(bounds))


def test_the_difference_is_paired(pack):
    """One better in every answer: the difference is certain, however the questions differ."""
    one, two = answered("one", pack), answered("two", pack)
    requests = RULES.requests(pack, one, two)
    assert len({request.key for request in requests}) == 24
    base = {f"{number}/{turn}": number % 7 + turn for number in range(81, 87) for turn in (1, 2)}
    replies = {
        request.key: Reply(f"[[{base[request.key.partition('/')[2]] + ours}]]", "stop")
        for request in requests
        for ours in (1 if request.key.startswith("model/") else 0,)
    }
    scores = by_name(RULES.score(pack, one, two, replies))
    delta = scores["delta_rating"]
    assert (delta.value, delta.low, delta.high) == pytest.approx((1, 1, 1))
    assert scores["rating"].high - scores["rating"].low > 0.5
    assert scores["rating"].value - scores["opponent_rating"].value == pytest.approx(1)
    swapped = {
        key.replace("model/", "x/").replace("opponent/", "model/").replace("x/", "opponent/"): reply
        for key, reply in replies.items()
    }
    assert by_name(RULES.score(pack, two, one, swapped))["delta_rating"].value == pytest.approx(-1)
    replies["opponent/81/1"] = Reply("unread", "stop")
    assert by_name(RULES.score(pack, one, two, replies))["delta_rating"].judged == 11


def test_numbers_off_the_scale_are_counted(pack):
    """FastChat averages them, so they are in the mean; that they are there is told."""
    answers = answered("mine", pack, 2)
    texts = ("[[100]]", "[[0]]", "[[10]]", "[[1]]")
    requests = RULES.requests(pack, answers, None, limit=2)
    replies = {one.key: Reply(text, "stop") for one, text in zip(requests, texts, strict=True)}
    scores = by_name(RULES.score(pack, answers, None, replies, limit=2))
    assert scores["rating"].value == pytest.approx(111 / 4)
    assert scores["out_of_scale"].value == 2


def test_without_a_rating_there_is_no_figure(pack):
    scores = by_name(RULES.score(pack, answered("mine", pack), None, {}))
    assert math.isnan(scores["rating"].value)
    assert (scores["rating"].low, scores["rating"].judged, scores["rating"].asked) == (None, 0, 12)
    assert RULES.baseline(pack) is None


def test_what_does_not_match_is_refused(pack):
    with pytest.raises(FPOError, match="answers of 'mine': nothing for 4 of 6 questions"):
        RULES.requests(pack, answered("mine", pack, 2), None)
    with pytest.raises(FPOError, match="answers of 'other': nothing for 4 of 6"):
        RULES.requests(pack, answered("mine", pack), answered("other", pack, 2))
    unjudged = pack._replace(files={"questions": pack.files["questions"]})
    with pytest.raises(FPOError, match=r"put FastChat's judge_prompts\.jsonl into"):
        RULES.requests(unjudged, answered("mine", pack), None)


def test_corrected_references_are_told_apart(pack, tmp_path):
    other = load_pack(mt_bench_folder(tmp_path / "mt", CATEGORIES))
    assert RULES.template_digest(other) == RULES.template_digest(pack)
    assert other.digest == pack.digest
    file = other.files["references"]
    file.write_text(file.read_text().replace("r.2", "right"))
    other = load_pack(tmp_path / "mt")
    assert RULES.template_digest(other) != RULES.template_digest(pack)
    assert other.digest != pack.digest
