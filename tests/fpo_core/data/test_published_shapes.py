"""Columns and spellings of published data sets give the pair that they mean, or say why not."""

import json
from typing import Any

import pytest

from fpo_core.data.conversations.model import Conversation
from fpo_core.data.conversations.reader import Reading, Survey, read_source
from fpo_core.data.drops import DroppedPair

ASKED, EIGHT, MANY = "How many legs has a spider?", "Eight.", "Many."
PAIR = ([("user", ASKED)], [("assistant", EIGHT)], [("assistant", MANY)])
LATER = [("user", "Hi."), ("assistant", "Hello.")]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


WHOLE = ([user(ASKED), assistant(EIGHT)], [user(ASKED), assistant(MANY)])
NAMED: dict[str, Any] = {"prompt": ASKED, "chosen": EIGHT, "rejected": MANY}
VOTE = {"prompt": ASKED, "response_a": EIGHT, "response_b": MANY}
PLAIN: dict[str, dict[str, Any]] = {
    "SHP": {"history": ASKED, "human_ref_A": EIGHT, "human_ref_B": MANY, "labels": 1},
    "ms-swift, rejected_response": {"messages": WHOLE[0], "rejected_response": MANY},
    "ms-swift, rejected_messages": {"messages": WHOLE[0], "rejected_messages": WHOLE[1]},
    "ms-swift, response": {"query": ASKED, "response": EIGHT, "rejected_response": MANY},
    "one answer per list": {**NAMED, "chosen": [EIGHT], "rejected": [MANY]},
    "an empty prompt before whole sides": {
        "prompt": "",
        "chosen": WHOLE[0],
        "rejected": WHOLE[1],
    },
    "an empty instruction before an input": {
        "instruction": "",
        "input": ASKED,
        "chosen": EIGHT,
        "rejected": MANY,
    },
    "columns that CSV leaves empty": {
        **NAMED,
        **dict.fromkeys(("system", "history", "images", "documents", "tools", "input"), ""),
    },
    "one message as JSON text": {
        **NAMED,
        "chosen": json.dumps(assistant(EIGHT)),
        "rejected": json.dumps(assistant(MANY)),
    },
    "JSON text within JSON text": {
        "chosen": json.dumps(json.dumps(WHOLE[0])),
        "rejected": json.dumps(json.dumps(WHOLE[1])),
    },
    "HH without blank lines": {
        "chosen": f"Human: {ASKED}\nAssistant: {EIGHT}",
        "rejected": f"Human: {ASKED}\nAssistant: {MANY}",
    },
    "HH prompt without blank lines": {
        "prompt": f"Human: {ASKED}\nAssistant:",
        "chosen": f" {EIGHT}",
        "rejected": f" {MANY}",
    },
    "HH prompt, marked answers": {
        "prompt": f"\n\nHuman: {ASKED}\n\nAssistant:",
        "chosen": f"\n\nAssistant: {EIGHT}",
        "rejected": f"\n\nAssistant: {MANY}",
    },
    "a vote by name": {**VOTE, "winner": "Model A"},
    "a vote with numbers as text": {
        **VOTE,
        "winner_model_a": "1",
        "winner_model_b": "0",
        "winner_tie": "0",
    },
    "HelpSteer2 as text": {
        "prompt": ASKED,
        "response_1": EIGHT,
        "response_2": MANY,
        "preference_strength": "-2",
    },
    "PKU-SafeRLHF as text": {
        "prompt": ASKED,
        "response_0": MANY,
        "response_1": EIGHT,
        "better_response_id": "1",
    },
    "arena votes with lists of rounds": {
        "prompt": json.dumps([ASKED]),
        "response_a": json.dumps([EIGHT]),
        "response_b": json.dumps([MANY]),
        "winner_model_a": 1,
        "winner_tie": 0,
    },
}
SEVERAL = {
    "capybara": {
        "conversation": [{"input": "Hi.", "output": "Hello."}, {"input": ASKED, "output": ""}],
        "chosen": EIGHT,
        "rejected": MANY,
    },
    "history as JSON text": {
        "instruction": ASKED,
        "history": json.dumps([["Hi.", "Hello."]]),
        "chosen": EIGHT,
        "rejected": MANY,
    },
    "history of rounds": {
        "instruction": ASKED,
        "history": [{"user": "Hi.", "assistant": "Hello."}],
        "chosen": EIGHT,
        "rejected": MANY,
    },
}


def read(tmp_path, row: dict[str, Any], **reading: Any) -> tuple[list[Any], Survey]:
    file, survey = tmp_path / "d.jsonl", Survey()
    file.write_text(json.dumps(row) + "\n")
    return list(read_source(str(file), None, Reading(**reading), survey)), survey


def said(pair: Any) -> tuple[list[tuple[str, str]], ...]:
    assert isinstance(pair, Conversation), pair
    assert pair.rejected is not None
    turns = (pair.prompt, pair.chosen, pair.rejected)
    return tuple([(turn.role, turn.content) for turn in each] for each in turns)


@pytest.mark.parametrize("shape", PLAIN)
def test_a_published_shape_gives_its_pair_and_uses_every_column(tmp_path, shape):
    (pair,), survey = read(tmp_path, PLAIN[shape])
    assert said(pair) == PAIR
    assert not survey.unused


@pytest.mark.parametrize("shape", SEVERAL)
def test_earlier_rounds_are_read_in_every_spelling(tmp_path, shape):
    (pair,), survey = read(tmp_path, SEVERAL[shape])
    assert said(pair) == (LATER + PAIR[0], *PAIR[1:])
    assert not survey.unused


def test_arena_votes_of_several_rounds_part_at_the_first_answer(tmp_path):
    row = {
        "prompt": json.dumps(["Hi.", ASKED]),
        "response_a": json.dumps(["Hello.", MANY]),
        "response_b": json.dumps(["Hey.", EIGHT]),
        "winner_model_a": 0,
        "winner_tie": 0,
    }
    (pair,), survey = read(tmp_path, row)
    prompt, chosen, rejected = said(pair)
    assert prompt == [("user", "Hi.")]
    assert chosen == [("assistant", "Hey."), ("user", ASKED), ("assistant", EIGHT)]
    assert rejected == [("assistant", "Hello."), ("user", ASKED), ("assistant", MANY)]
    assert not survey.unused


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({**VOTE, "winner": 1}, "shape", "winner=1 does not say which answer is preferred"),
        ({**VOTE, "winner": "left"}, "shape", "expected model_a, model_b or tie"),
        ({**VOTE, "winner": "both_bad"}, "no_preference", "prefers neither"),
        ({**VOTE, "winner_model_a": "0", "winner_tie": "1"}, "no_preference", "neither"),
        ({**NAMED, "system": "A", "system_prompt": "B"}, "two_systems", "'system_prompt' differ"),
        ({**NAMED, "chosen": [EIGHT, "8"]}, "candidates", "{chosen: chosen.0}"),
        ({"messages": WHOLE[0], "label": True}, "shape", "judges one answer (KTO)"),
        ({**NAMED, "chosen": str(WHOLE[0]), "rejected": str(WHOLE[1])}, "not_text", "json.dumps"),
        ({**NAMED, "chosen": json.dumps(WHOLE[0])[:-3]}, "not_text", "json.dumps"),
        (
            {**NAMED, "chosen": [{"role": "assistant", "content": [{"type": "thinking"}]}]},
            "not_text",
            "a part of type 'thinking'",
        ),
        (
            {
                "input": {"messages": WHOLE[0][:1], "documents": ["d"]},
                "preferred_output": WHOLE[0][1:],
                "non_preferred_output": WHOLE[1][1:],
            },
            "unsupported",
            "'documents'",
        ),
        (
            {**NAMED, "initial_reason_steps": "Step 1."},
            "unsupported",
            "'initial_reason_steps'",
        ),
        (
            {**NAMED, "chosen": [{"from": "gpt", "value": EIGHT, "content": MANY}]},
            "ambiguous_turn",
            "'content' and 'value' differ",
        ),
        (
            {**NAMED, "chosen": [{"role": "assistant", "content": EIGHT, "tool_calls": "w()"}]},
            "unsupported",
            "`tool_calls` is not a list of calls",
        ),
        (
            {"prompt": ASKED, "response": EIGHT, "helpfulness": 3},
            "shape",
            "one answer ('response')",
        ),
        (
            {**NAMED, "chosen": [{"role": "assistant", "content": EIGHT, "weight": 0}]},
            "unsupported",
            "`weight: 0`",
        ),
    ],
)
def test_what_cannot_be_used_is_dropped_with_its_reason(tmp_path, row, reason, detail):
    (dropped,), _ = read(tmp_path, row)
    assert isinstance(dropped, DroppedPair)
    assert dropped.reason == reason
    assert detail in dropped.detail


@pytest.mark.parametrize(
    "answer",
    [
        '[{"a": 1}]',
        '{"role": "admin", "content": "x"}',
        '[{"role": "user", "content": "x"}] is one message.',
        '{"value": 3, broken',
        "Human: a species. Assistant: a job.",
    ],
)
def test_an_answer_that_only_looks_like_messages_stays_as_it_is(tmp_path, answer):
    (pair,), _ = read(tmp_path, {**NAMED, "chosen": answer})
    assert said(pair)[1] == [("assistant", answer)]


def test_what_is_unused_within_a_column_is_named(tmp_path):
    completions = [
        {"response": EIGHT, "overall_score": 9, "custom_system_prompt": "Be right."},
        {"response": MANY, "overall_score": 2, "custom_system_prompt": "Be wrong."},
    ]
    _, ranked = read(tmp_path, {"instruction": ASKED, "completions": completions})
    assert [*ranked.unused] == ["completions[].custom_system_prompt"]
    columns = {"prompt": "x.p", "chosen": "x.c", "rejected": "x.r"}
    row = {"x": {"p": ASKED, "s": "Be brief.", "c": EIGHT, "r": MANY}}
    (pair,), mapped = read(tmp_path, row, columns=columns)
    assert said(pair) == PAIR
    assert [*mapped.unused] == ["x.s"]


@pytest.mark.parametrize(
    "names",
    [
        ("score_chosen", "score_rejected"),
        ("chosen_score", "rejected_score"),
        ("chosen-rating", "rejected-rating"),
        ("chosen_avg_rating", "rejected_avg_rating"),
    ],
)
def test_scores_against_the_order_are_noted_in_every_spelling(tmp_path, names):
    _, survey = read(tmp_path, {**NAMED, **dict(zip(names, ("1.5", 2), strict=True))})
    assert [*survey.notes] == ["scores_reversed"]


def test_answers_that_kto_labels_false_are_not_learnt(tmp_path):
    for label in ("label", "kto_tag"):
        (dropped,), _ = read(tmp_path, {"messages": WHOLE[0], label: False}, turns="all")
        assert isinstance(dropped, DroppedPair)
        assert dropped.reason == "undesirable"


def test_a_dialogue_with_another_prompt_is_dropped(tmp_path):
    row = {"prompt": [user("Another.")], "messages": WHOLE[0]}
    (dropped,), _ = read(tmp_path, row, turns="all")
    assert isinstance(dropped, DroppedPair)
    assert dropped.reason == "prompt_mismatch"


@pytest.mark.parametrize("name", ["system", "system_instruction", "sys"])
def test_a_system_prompt_is_read_from_each_of_its_columns(tmp_path, name):
    (pair,), _ = read(tmp_path, {**NAMED, name: "Be brief."})
    assert said(pair)[0] == [("system", "Be brief."), ("user", ASKED)]


TOOL = {"type": "function", "function": {"name": "w", "description": None}}
WRITTEN = {"type": "function", "function": {"name": "w"}}


@pytest.mark.parametrize(
    "tools",
    [[TOOL], TOOL, json.dumps([TOOL]), json.dumps(TOOL), [json.dumps(TOOL)], [WRITTEN]],
    ids=["list", "object", "text", "text of an object", "list of texts", "no nulls"],
)
def test_tools_are_the_same_however_they_are_written(tmp_path, tools):
    """Nulls are left out as from Parquet: `datasets` writes them to JSON."""
    (pair,), _ = read(tmp_path, {**NAMED, "tools": tools})
    assert isinstance(pair, Conversation)
    assert pair.tools == (WRITTEN,)
    call = {"role": "assistant", "content": EIGHT, "tool_calls": tools}
    (called,), _ = read(tmp_path, {**NAMED, "chosen": [call]})
    assert isinstance(called, Conversation)
    assert called.chosen[0].extra == (("tool_calls", [WRITTEN]),)


@pytest.mark.parametrize(
    "prompt",
    [
        "USER: Hi.\nASSISTANT: Hello.\nUSER: Why?",
        "Hi.\n<extra_id_1>Assistant\nHello.\n<extra_id_1>User\nWhy?",
        "### Human: Hi.\n### Assistant: Hello.\n### Human: Why?",
        "<|im_start|>user\nHi.\n<|im_start|>assistant\nHello.",
    ],
)
def test_the_role_markers_of_other_formats_are_counted(tmp_path, prompt):
    (pair,), survey = read(tmp_path, {**NAMED, "prompt": prompt})
    assert said(pair)[0] == [("user", prompt)]
    assert survey.notes["role_markers"] == 1
    _, plain = read(tmp_path, {**NAMED, "prompt": "A: is this a marker?"})
    assert not plain.notes


def test_a_mapped_field_that_is_null_is_told_as_such(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"q": None, "chosen": EIGHT, "rejected": MANY}) + "\n")
    (dropped,) = read_source(str(path), None, Reading(columns={"prompt": "q"}))
    assert isinstance(dropped, DroppedPair)
    assert dropped.detail == "data.columns.prompt=q: it is null in this row"
