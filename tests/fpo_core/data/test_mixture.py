"""The splits of a recipe: weights, held-out prompts, leakage, unusable rows, metadata, mappings."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fpo_core.data.conversations.model import Conversation
from fpo_core.data.drops import REASONS, DroppedPair
from fpo_core.data.metadata import metadata_columns
from fpo_core.data.mixture import GIVE_UP_ROWS, Surveys, pair_sources, read_split
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenization import Rules, Tokenization
from fpo_core.data.tokenize import TokenizedPair
from fpo_core.data.truncation import Limits
from fpo_core.errors import FPOError
from fpo_core.recipe.data import DataSettings
from tests.tiny import make_tokenizer

CASES = Path("../shared/data/cases/preferences")
CHAT = ChatFormat(make_tokenizer(), "model")
LIMITS = Limits(None, 5000)


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Why {number}?", "chosen": f"So {number}.", "rejected": "No.", **more}


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(file)


def settings(train: Any, heldout: Any, **more: Any) -> DataSettings:
    return DataSettings(train=train, heldout=heldout, **more)


def conversations(data: DataSettings, split: str) -> list[Conversation]:
    found = read_split(split, pair_sources(data)[split], {}, Surveys())
    return [item for item in found if isinstance(item, Conversation)]


def prompts(data: DataSettings, split: str) -> list[str]:
    return [item.prompt[-1].content for item in conversations(data, split)]


def tokenization(data: DataSettings, share: float = 0.05) -> Tokenization:
    return Tokenization(CHAT, pair_sources(data), {}, Rules(LIMITS, "refuse", share, data.limit))


# --- weights, limits, held-out prompts


def test_a_weight_takes_about_its_share_and_the_same_rows_when_others_are_added(tmp_path):
    rows = [row(number) for number in range(2000)]
    held = write(tmp_path / "h.jsonl", [row(9999)])
    few = write(tmp_path / "few.jsonl", rows[::2])
    many = write(tmp_path / "many.jsonl", rows[::-1])
    taken = {
        name: set(prompts(settings([{"path": path, "weight": weight}], held), "train"))
        for name, path, weight in (("few", few, 0.3), ("many", many, 0.3), ("more", many, 0.6))
    }
    assert 230 < len(taken["few"]) < 370
    assert taken["few"] == taken["many"] & {each["prompt"] for each in rows[::2]}
    assert taken["many"] < taken["more"]  # a larger weight adds rows


def test_limits_count_examples_and_not_what_is_dropped(tmp_path):
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}, *(row(n) for n in range(9))]
    one, two = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows[:4])
    data = settings([{"path": one, "limit": 2}, two], one)
    assert prompts(data, "train") == ["Why 0?", "Why 1?", "Why 0?", "Why 1?", "Why 2?"]
    found = read_split("train", pair_sources(data)["train"], {}, Surveys(), limit=3)
    kept = [item for item in found if isinstance(item, Conversation)]
    assert len(kept) == 3


def test_heldout_prompts_are_a_share_by_prompt_and_stay_when_rows_are_added(tmp_path):
    rows = [row(number % 400, chosen=f"Answer {number}") for number in range(1200)]
    small = write(tmp_path / "small.jsonl", rows[:600])
    large = write(tmp_path / "large.jsonl", [*rows[600:], *rows[:600]])
    split = {
        (path, name): prompts(settings(path, {"fraction": 0.1}), name)
        for path in (small, large)
        for name in ("train", "heldout")
    }
    for path, size in ((small, 600), (large, 1200)):
        train, heldout = split[path, "train"], split[path, "heldout"]
        assert len(train) + len(heldout) == size
        assert not {*train} & {*heldout}  # all pairs of a prompt are in one split
        assert 15 < len({*heldout}) < 65
    assert {*split[small, "heldout"]} == {*split[large, "heldout"]}
    more = prompts(settings(large, {"fraction": 0.3}), "heldout")
    assert {*split[large, "heldout"]} < {*more}


def test_prompts_that_differ_in_case_and_space_are_held_out_together(tmp_path):
    rows = []
    for number in range(50):
        rows += [row(number), row(number, prompt=f" WHY  {number}?\n", chosen="Other.")]
    file = write(tmp_path / "d.jsonl", rows)
    heldout = prompts(settings(file, {"fraction": 0.3}), "heldout")
    assert {*Counter(" ".join(each.lower().split()) for each in heldout).values()} == {2}


def test_what_is_dropped_of_a_source_of_both_splits_is_counted_once(tmp_path):
    rows = [*(row(number) for number in range(100)), {"prompt": "", "chosen": "a", "rejected": "b"}]
    file = write(tmp_path / "d.jsonl", rows)
    work = tokenization(settings(file, {"fraction": 0.2}))
    for split in ("train", "heldout"):
        list(work.examples(split))
    assert work.stats()["dropped"] == {"empty_prompt": 1}
    assert sum(work.pairs.values()) == 100


# --- leakage


@pytest.mark.parametrize(
    "heldout",
    [
        row(1),
        row(1, chosen="Another answer."),
        row(1, prompt="  why\n1? "),
        {"prompt": "Why 1?", "chosen": "No.", "rejected": "So 1."},
        {
            "chosen": "\n\nHuman: Why 1?\n\nAssistant: a",
            "rejected": "\n\nHuman: Why 1?\n\nAssistant: b",
        },
    ],
)
def test_a_heldout_pair_with_a_prompt_of_the_training_data_is_dropped(tmp_path, heldout):
    train = write(tmp_path / "t.jsonl", [row(number) for number in range(3)])
    held = write(tmp_path / "h.jsonl", [heldout, row(7)])
    work = tokenization(settings(train, held))
    list(work.examples("train"))
    leaked, kept = work.examples("heldout")
    assert isinstance(leaked, DroppedPair)
    assert leaked.reason == "in_train"
    assert isinstance(kept, TokenizedPair)
    assert work.stats()["dropped"] == {"in_train": 1}


def test_the_same_question_after_another_system_prompt_or_other_turns_is_no_leak(tmp_path):
    train = write(tmp_path / "t.jsonl", [row(1)])
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Why 1?")]
    asked = [{"role": role, "content": text} for role, text in turns]
    held = write(tmp_path / "h.jsonl", [row(1, system="Be brief."), row(1, prompt=asked)])
    work = tokenization(settings(train, held))
    list(work.examples("train"))
    assert all(isinstance(item, TokenizedPair) for item in work.examples("heldout"))


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not on this machine")
def test_the_leaking_case_leaves_nothing_and_names_the_reason_with_a_row():
    data = settings(str(CASES / "leak_train.jsonl"), str(CASES / "leak_heldout.jsonl"))
    work = tokenization(data)
    list(work.examples("train"))
    with pytest.raises(FPOError) as refused:
        list(work.examples("heldout"))
    told = str(refused.value)
    assert "no example of the heldout split is left" in told
    assert "3 x a held-out pair whose prompt is in the training data" in told
    assert "leak_heldout.jsonl, line 1" in told
    assert "data.heldout={fraction: 0.05}" in told
    assert "max_length" not in told


# --- unusable rows


def with_odd_rows(tmp_path: Path, odd: list[dict[str, Any]], sound: int) -> DataSettings:
    file = write(tmp_path / "d.jsonl", [*(row(number) for number in range(sound)), *odd])
    return settings(file, file)


EMPTY = {"prompt": "q", "chosen": "", "rejected": "b"}
BLANK_PROMPT = {"prompt": " ", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("sound", [1, 5, 300])
def test_one_odd_row_never_stops_a_run(tmp_path, sound):
    work = tokenization(with_odd_rows(tmp_path, [EMPTY], sound))
    assert sum(isinstance(item, TokenizedPair) for item in work.examples("train")) == sound


def test_too_many_rows_of_one_reason_stop_with_a_table_of_all(tmp_path):
    work = tokenization(with_odd_rows(tmp_path, [*[EMPTY] * 6, *[BLANK_PROMPT] * 2], 92))
    with pytest.raises(FPOError) as refused:
        list(work.examples("train"))
    told = str(refused.value)
    assert "8 of 100 rows of the train split cannot be used" in told
    assert told.index("6 x a response is empty") < told.index("2 x the prompt is empty")
    assert "d.jsonl, line 93: a response is empty" in told
    assert "raise data.max_bad_share=0.05" in told


def test_the_share_is_of_each_reason_alone(tmp_path):
    odd = [*[EMPTY] * 5, *[BLANK_PROMPT] * 5]
    work = tokenization(with_odd_rows(tmp_path, odd, 90))
    assert len(list(work.examples("train"))) == 100
    with pytest.raises(FPOError, match="10 of 100 rows"):
        list(tokenization(with_odd_rows(tmp_path, odd, 90), 0.04).examples("train"))


def test_a_share_of_zero_stops_on_one_row_and_a_share_of_one_on_none(tmp_path):
    data = with_odd_rows(tmp_path, [EMPTY], 50)
    with pytest.raises(FPOError, match="1 of 51 rows"):
        list(tokenization(data, 0).examples("train"))
    data = with_odd_rows(tmp_path, [EMPTY] * 40, 1)
    assert len(list(tokenization(data, 1).examples("train"))) == 41


def test_sound_rows_that_are_left_out_do_not_count(tmp_path):
    same = [row(5) for _ in range(50)]
    tie = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie"}
    work = tokenization(with_odd_rows(tmp_path, [*same, *[tie] * 50], 10), 0)
    list(work.examples("train"))
    assert work.stats()["dropped"] == {"duplicate": 50, "no_preference": 50}


def test_when_every_row_is_dropped_the_message_names_the_real_reason(tmp_path):
    work = tokenization(with_odd_rows(tmp_path, [EMPTY, BLANK_PROMPT, EMPTY], 0), 1)
    with pytest.raises(FPOError) as refused:
        list(work.examples("train"))
    told = str(refused.value)
    assert "no example of the train split is left" in told
    assert "2 x a response is empty" in told
    assert "line 1: a response is empty" in told
    assert "max_length" not in told


def test_a_large_file_of_another_kind_is_given_up_early(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"text": "plain"} for _ in range(GIVE_UP_ROWS + 500)])
    found = tokenization(settings(file, file)).examples("train")
    with pytest.raises(FPOError) as refused:
        list(found)
    told = str(refused.value)
    assert f"none of the first {GIVE_UP_ROWS:,} rows can be used" in told
    assert REASONS["shape"].remedy in told
    assert "columns={prompt: ..., chosen: ..., rejected: ...}" in told


# --- metadata


def test_metadata_columns_get_the_type_of_their_values(tmp_path):
    values: dict[str, list[Any]] = {
        "topic": ["maths", None],
        "score": [1, 2],
        "mean": [1, 2.5],
        "good": [True, False],
        "large": [2**70, 3],
        "tags": [["a", "é"], []],
        "mixed": ["a", 3],
        "source": ["web", "book"],
    }
    rows = [
        row(number, meta={"lang": "en"}, **{name: of[number] for name, of in values.items()})
        for number in range(2)
    ]
    file = write(tmp_path / "d.jsonl", rows)
    names = (*values, "meta.lang")
    data = settings(file, file, metadata=names)
    sources = pair_sources(data)
    columns = metadata_columns(sources, {})
    assert columns.kinds == {
        "topic": "string",
        "score": "int64",
        "mean": "float64",
        "good": "bool",
        "large": "string",
        "tags": "string",
        "mixed": "string",
        "source": "string",
        "meta.lang": "string",
    }
    first, second = (columns.row(each.metadata) for each in conversations(data, "train"))
    assert first == {
        "topic": "maths",
        "score": 1,
        "mean": 1.0,
        "good": True,
        "large": str(2**70),
        "tags": '["a", "é"]',
        "mixed": "a",
        "row_source": "web",
        "meta.lang": "en",
    }
    assert (second["topic"], second["mean"], second["mixed"]) == (None, 2.5, "3")
    assert {*columns.stored} == {*first}


def test_a_metadata_column_that_no_row_has_is_named_with_those_there_are(tmp_path):
    file = write(tmp_path / "d.jsonl", [row(1, topic="x")])
    with pytest.raises(FPOError, match=r"no row has 'subject'. The rows have .*'topic'"):
        metadata_columns(pair_sources(settings(file, file, metadata=("subject",))), {})


def test_metadata_is_used_and_other_columns_are_named_once_per_source(tmp_path, caplog):
    file = write(tmp_path / "d.jsonl", [row(n, topic="x", uid=n, note=None) for n in range(3)])
    work = tokenization(settings(file, write(tmp_path / "h.jsonl", [row(8)]), metadata=("topic",)))
    list(work.examples("train"))
    with caplog.at_level("INFO"):
        work.report()
    warnings = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert warnings == [
        f"{file}: column 'uid' is not used (data.metadata keeps columns with the pairs)"
    ]


# --- column mappings


def test_mappings_reach_into_rows_have_constants_and_are_per_source(tmp_path):
    one = write(
        tmp_path / "a.jsonl",
        [{"q": "Why?", "answers": [{"text": "So."}, {"text": "No."}], "system": "not this"}],
    )
    two = write(tmp_path / "b.jsonl", [{"ask": "Who?", "chosen": "I.", "rejected": "You."}])
    three = write(
        tmp_path / "c.jsonl", [{"prompt": "Which?", "chosen": "This.", "rejected": "No."}]
    )
    data = settings(
        [one, {"path": two, "columns": {"prompt": "ask"}}, {"path": three, "columns": {}}],
        three,
        columns={
            "prompt": "q",
            "chosen": "answers.0.text",
            "rejected": "answers.-1.text",
            "system": {"constant": "Be brief."},
        },
    )
    found = [
        [
            [turn.content for turn in turns]
            for turns in (each.prompt, each.chosen, each.rejected or ())
        ]
        for each in conversations(data, "train")
    ]
    assert found == [
        [["Be brief.", "Why?"], ["So."], ["No."]],
        [["Who?"], ["I."], ["You."]],
        [["Which?"], ["This."], ["No."]],
    ]


@pytest.mark.parametrize("path", ["nothing", "answers.5", "answers.0.nothing", "q.0", "answers.x"])
def test_a_path_that_leads_nowhere_drops_the_row_and_says_where_it_ends(tmp_path, path):
    file = write(tmp_path / "d.jsonl", [{"q": "Why?", "answers": ["So.", "No."]}])
    data = settings(file, file, columns={"prompt": "q", "chosen": path, "rejected": "answers.1"})
    (dropped,) = read_split("train", pair_sources(data)["train"], {}, Surveys())
    assert isinstance(dropped, DroppedPair)
    assert dropped.reason == "missing_field"
    assert f"data.columns.chosen={path}" in dropped.detail
    assert "It has 'q', 'answers'" in dropped.detail


def test_other_columns_that_could_be_the_prompt_give_way_to_the_mapping(tmp_path):
    rows = [{"prompt": "The page.", "instruction": "Sum it up.", "chosen": "a", "rejected": "b"}]
    file = write(tmp_path / "d.jsonl", rows)
    (dropped,) = read_split("train", pair_sources(settings(file, file))["train"], {}, Surveys())
    assert isinstance(dropped, DroppedPair)
    assert dropped.reason == "ambiguous"
    data = settings(file, file, columns={"prompt": "instruction"})
    assert prompts(data, "train") == ["Sum it up."]
