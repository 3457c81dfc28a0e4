"""Reading preference data: every shape that is understood, every fault by file and line."""

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_core.data.pairs import read_pairs
from fpo_core.errors import FPOError

USER = {"role": "user", "content": "How many legs has a spider?"}
YES = {"role": "assistant", "content": "Eight."}
NO = {"role": "assistant", "content": "It depends."}
EXPECTED = ([USER], "Eight.", "It depends.")

SHAPES = {
    "plain": {"prompt": USER["content"], "chosen": "Eight.", "rejected": "It depends."},
    "conversational": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "ultrafeedback": {
        "prompt": USER["content"], "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 9,
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
}  # fmt: skip


def write(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_pair(tmp_path, shape):
    (pair,) = read_pairs(write(tmp_path / "d.jsonl", [SHAPES[shape]]))
    assert (list(pair.prompt), pair.chosen, pair.rejected) == EXPECTED


def test_json_and_parquet_give_what_jsonl_gives(tmp_path):
    rows = [SHAPES["plain"], {**SHAPES["plain"], "prompt": "And an ant?", "chosen": "Six."}]
    wanted = [pair.pair_id for pair in read_pairs(write(tmp_path / "d.jsonl", rows))]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pl.DataFrame(rows).write_parquet(tmp_path / "d.parquet")
    for name in ("d.json", "d.parquet"):
        pairs = list(read_pairs(str(tmp_path / name)))
        assert [pair.pair_id for pair in pairs] == wanted
        assert pairs[1].where.endswith(f"{name}, row 2")


def test_a_system_turn_and_earlier_turns_are_part_of_the_prompt(tmp_path):
    hello = {"role": "assistant", "content": "Hello."}
    rows = [
        {**SHAPES["plain"], "system": "Be brief."},
        {"prompt": [{"role": "user", "content": "Hi"}, hello, USER], "chosen": [YES],
         "rejected": [NO]},
    ]  # fmt: skip
    with_system, dialogue = read_pairs(write(tmp_path / "d.jsonl", rows))
    assert with_system.prompt[0] == {"role": "system", "content": "Be brief."}
    assert [turn["role"] for turn in dialogue.prompt] == ["user", "assistant", "user"]
    assert with_system.pair_id != dialogue.pair_id


@given(st.lists(st.text(), min_size=3, max_size=3), st.lists(st.text(), min_size=3, max_size=3))
def test_pair_ids_follow_the_content(one, other):
    from fpo_core.data.pairs import PreferencePair

    def pair(parts, where):
        return PreferencePair(({"role": "user", "content": parts[0]},), *parts[1:], where)

    assert (pair(one, "a").pair_id == pair(other, "b").pair_id) == (one == other)


GOOD = json.dumps(SHAPES["plain"])
FAULTS = {
    "not JSON": (f"{GOOD}\n{{oops\n", r"d\.jsonl, line 2: not JSON \(.*column 2\)"),
    "not an object": (f"{GOOD}\n\n[1, 2]\n", r"d\.jsonl, line 3: a row is a JSON object.*list"),
    "no chosen": (
        json.dumps({"prompt": "q", "rejected": "a"}),
        r"line 1: the row has no 'chosen' \(it has 'prompt', 'rejected'\)",
    ),
    "chosen empty": (
        json.dumps({"prompt": "q", "chosen": "", "rejected": "a"}),
        r"line 1: the row has no 'chosen'",
    ),
    "no prompt": (
        json.dumps({"chosen": "a", "rejected": "b"}),
        r"line 1: not a preference pair of a known shape.*expected prompt/chosen/rejected",
    ),
    "prompt ends in an answer": (
        json.dumps({"prompt": [USER, YES], "chosen": "a", "rejected": "b"}),
        r"line 1: the prompt does not end in a user's turn",
    ),
    "content that is no text": (
        json.dumps({"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}),
        r"line 1: not a preference pair of a known shape.*a text is NoneType",
    ),
    "unknown role": (
        json.dumps({"prompt": [{"role": "robot", "content": "?"}], "chosen": "a", "rejected": "b"}),
        r"line 1: not a preference pair of a known shape \(KeyError: 'robot'\)",
    ),
    "empty": ("", r"d\.jsonl' is empty"),
    "blank lines": ("\n\n", r"d\.jsonl' holds no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_by_file_and_line(tmp_path, fault):
    text, message = FAULTS[fault]
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(FPOError, match=message):
        list(read_pairs(str(tmp_path / "d.jsonl")))


def test_files_that_are_not_there_or_not_readable(tmp_path):
    with pytest.raises(FPOError, match=r"nothing\.jsonl' does not exist; a relative path starts"):
        list(read_pairs(str(tmp_path / "nothing.jsonl")))
    for name, content, message in (
        ("d.csv", b"a,b", r"unknown kind; use \.jsonl, \.json or \.parquet"),
        ("d.json", b'{"a": 1}', "holds one list of rows"),
        ("d.json", b'[{"a": 1},\n {]', r"d\.json, line 2: not JSON"),
        ("d.jsonl", b'{"prompt": "\xff"}', r"line 1: not UTF-8 text"),
        ("d.parquet", b"PAR1 not", "not a readable Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FPOError, match=message):
            list(read_pairs(str(tmp_path / name)))
