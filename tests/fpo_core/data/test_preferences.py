"""Reading preference data: every shape that is understood, every fault by file and line."""

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, Conversation, Turn
from fpo_core.data.conversations.model import USER as USER_ROLE
from fpo_core.data.conversations.reader import Reading, Survey, read_source
from fpo_core.data.drops import DroppedPair
from fpo_core.errors import FPOError

USER = {"role": "user", "content": "How many legs has a spider?"}
YES = {"role": "assistant", "content": "Eight."}
NO = {"role": "assistant", "content": "It depends."}
EXPECTED = (
    (Turn(USER_ROLE, USER["content"]),),
    (Turn(ASSISTANT, "Eight."),),
    (Turn(ASSISTANT, "It depends."),),
)

SHAPES = {
    "plain": {"prompt": USER["content"], "chosen": "Eight.", "rejected": "It depends."},
    "conversational": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "implicit prompt": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "ultrafeedback": {
        "prompt": USER["content"],
        "chosen": [USER, YES],
        "rejected": [USER, NO],
        "messages": [USER, YES],
        "score_chosen": 9,
        "score_rejected": 2,
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": USER["content"]}],
        "chosen": {"from": "gpt", "value": "Eight."},
        "rejected": {"from": "gpt", "value": "It depends."},
    },
    "hh": {
        "chosen": f"\n\nHuman: {USER['content']}\n\nAssistant: Eight.",
        "rejected": f"\n\nHuman: {USER['content']}\n\nAssistant: It depends.",
    },
    "rm-static": {
        "prompt": f"\n\nHuman: {USER['content']}\n\nAssistant:",
        "response": " Eight.",
        "chosen": " Eight.",
        "rejected": " It depends.",
    },
    "HelpSteer2": {
        "prompt": USER["content"],
        "response_1": "It depends.",
        "response_2": "Eight.",
        "preference_strength": 1,
    },
    "PKU-SafeRLHF": {
        "prompt": USER["content"],
        "response_0": "It depends.",
        "response_1": "Eight.",
        "better_response_id": 1,
    },
    "arena with a winner": {
        "prompt": USER["content"],
        "response_a": "It depends.",
        "response_b": "Eight.",
        "winner": "model_b",
    },
    "arena with one-hot winners": {
        "prompt": USER["content"],
        "response_a": "Eight.",
        "response_b": "It depends.",
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    },
    "SHP": {
        "history": None,
        "question": USER["content"],
        "human_ref_A": "Eight.",
        "human_ref_B": "It depends.",
        "labels": 1,
    },
    "LLaMA-Factory, two outputs": {
        "instruction": USER["content"],
        "input": "",
        "output": ["Eight.", "It depends."],
    },
    "UltraFeedback's completions": {
        "instruction": USER["content"],
        "completions": [
            {"response": "It depends.", "overall_score": 2.0},
            {"response": "Eight.", "overall_score": 9.0},
        ],
    },
    "distilabel's generations": {
        "instruction": USER["content"],
        "generations": ["It depends.", "Eight."],
        "ratings": [1, 5],
    },
    "OpenAI's preference format": {
        "input": {"messages": [USER]},
        "preferred_output": [YES],
        "non_preferred_output": [NO],
    },
}


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **reading) -> list:
    return list(read_source(path, None, Reading(**reading)))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_pair_and_uses_every_column(tmp_path, shape):
    survey = Survey()
    (pair,) = read_source(write(tmp_path / "d.jsonl", [SHAPES[shape]]), survey=survey)
    assert isinstance(pair, Conversation)
    assert pair[:3] == EXPECTED
    assert not survey.unused


def test_json_and_parquet_give_what_jsonl_gives(tmp_path):
    rows = [SHAPES["plain"], {**SHAPES["plain"], "prompt": "And an ant?", "chosen": "Six."}]
    wanted = [pair.pair_id for pair in read(write(tmp_path / "d.jsonl", rows))]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pl.DataFrame(rows).write_parquet(tmp_path / "d.parquet")
    for name in ("d.json", "d.parquet"):
        pairs = read(str(tmp_path / name))
        assert [pair.pair_id for pair in pairs] == wanted
        assert f"{name}, " in pairs[1].where


def test_a_system_turn_and_earlier_turns_are_part_of_the_prompt(tmp_path):
    hello = {"role": "assistant", "content": "Hello."}
    rows = [
        {**SHAPES["plain"], "system": "Be brief."},
        {
            "prompt": [{"role": "user", "content": "Hi"}, hello, USER],
            "chosen": [YES],
            "rejected": [NO],
        },
    ]
    with_system, dialogue = read(write(tmp_path / "d.jsonl", rows))
    assert with_system.prompt[0] == Turn(SYSTEM, "Be brief.")
    assert [turn.role for turn in dialogue.prompt] == ["user", "assistant", "user"]
    assert with_system.pair_id != dialogue.pair_id


@settings(deadline=None)
@given(st.lists(st.text(), min_size=3, max_size=3), st.lists(st.text(), min_size=3, max_size=3))
def test_pair_ids_follow_the_content(one, other):
    def pair(parts, where):
        prompt, *sides = ((Turn(role, text),) for role, text in zip(ROLES, parts, strict=True))
        return Conversation(prompt, *sides, where)

    assert (pair(one, "a").pair_id == pair(other, "b").pair_id) == (one == other)


ROLES = (USER_ROLE, ASSISTANT, ASSISTANT)


def test_pair_ids_of_plain_pairs_are_those_of_earlier_versions():
    """Stored answers, judgments and explanations name pairs by them."""
    pair = Conversation(*EXPECTED, "anywhere")
    assert pair.pair_id == "9f5105b8f9ab3462"


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ([1, 2], "not_an_object", "a row is a JSON object, this is a list"),
        ({"prompt": "q", "rejected": "a"}, "no_answer", "no 'chosen'. It has 'prompt', 'rejected'"),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "empty", ""),
        ({"prompt": "q", "chosen": "", "rejected": ""}, "empty", ""),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical", ""),
        ({"chosen": "a", "rejected": "b"}, "shape", "no prompt. It has 'chosen', 'rejected'"),
        (
            {"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"},
            "empty_prompt",
            "a user turn",
        ),
        (
            {"prompt": [{"role": "robot", "content": "?"}], "chosen": "a", "rejected": "b"},
            "unknown_role",
            "the role 'robot', expected one of system, user, assistant, tool",
        ),
        (
            {"prompt": "q", "completion": "a", "label": True},
            "shape",
            "judges one answer (KTO)",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_dropped_by_line_with_their_reason(
    tmp_path, row, reason, detail
):
    good, dropped = read(write(tmp_path / "d.jsonl", [SHAPES["plain"], row]))
    assert isinstance(good, Conversation)
    assert isinstance(dropped, DroppedPair)
    assert (dropped.reason, dropped.where) == (reason, f"{tmp_path}/d.jsonl, line 2")
    assert detail in dropped.detail


def test_a_prompt_that_ends_in_an_answer_is_continued_by_both_sides(tmp_path):
    row = {"prompt": [USER, YES], "chosen": " Not six.", "rejected": " Or six."}
    survey = Survey()
    (pair,) = read_source(write(tmp_path / "d.jsonl", [row]), survey=survey)
    assert isinstance(pair, Conversation)
    assert [turn.role for turn in pair.prompt] == ["user", "assistant"]
    assert survey.notes == {"prefilled": 1}


GOOD = json.dumps(SHAPES["plain"]).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", GOOD + b"{oops\n", r"d\.jsonl, line 2: not JSON \(.*column 2\)"),
        ("d.jsonl", b"", r"d\.jsonl' is empty"),
        ("d.jsonl", b"\n\n", r"d\.jsonl' holds no rows"),
        ("d.jsonl", None, r"d\.jsonl' does not exist; a relative path starts"),
        ("d.json", b'[{"a": 1},\n {]', r"d\.json, line 2: not JSON"),
        ("d.jsonl", b'{"prompt": "\xff"}', r"line 1: not UTF-8 text"),
        ("d.csv", b"a,b", "holds no rows"),
        ("d.parquet", b"PAR1 not", "not a readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read_stop_with_their_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FPOError, match=message):
        read(str(tmp_path / name))


def test_rankings_give_the_widest_gap_first_and_as_many_pairs_as_asked_for(tmp_path):
    answers = [
        {"answer": text, "rank": rank} for text, rank in zip("bdac", (2, 4, 1, 3), strict=True)
    ]
    file = write(tmp_path / "d.jsonl", [{"prompt": "q", "answers": answers}])
    found = {
        most: [pair.chosen[0].content + pair.rejected[0].content for pair in pairs]
        for most in (1, 3, 9)
        for pairs in [read(file, pairs_per_prompt=most)]
    }
    assert found == {1: ["ad"], 3: ["ad", "ac", "bd"], 9: ["ad", "ac", "bd", "ab", "bc", "cd"]}


@pytest.mark.parametrize(
    "row",
    [
        {"response_1": "a", "response_2": "b", "preference_strength": 0},
        {"response_a": "a", "response_b": "b", "winner": "tie"},
        {"response_a": "a", "response_b": "b", "winner_model_a": 0, "winner_tie": 1},
        {"answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
        {"generations": ["a", "b"], "ratings": [3.0, 3.0]},
    ],
)
def test_ties_are_dropped_and_are_no_fault(tmp_path, row):
    (dropped,) = read(write(tmp_path / "d.jsonl", [{"prompt": "q", **row}]))
    assert dropped.reason == "no_preference"
