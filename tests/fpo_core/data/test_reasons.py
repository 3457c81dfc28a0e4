"""Every reason for a dropped row has a row that gives it, and nothing else comes of any row."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fpo_core.data.conversations.fields import NOTES
from fpo_core.data.conversations.model import Conversation
from fpo_core.data.conversations.reader import Reading, Survey, read_conversations, read_source
from fpo_core.data.drops import REASONS, DroppedPair
from fpo_core.data.mixture import without_leaks
from fpo_core.data.render import ChatFormat
from fpo_core.data.sources.row import Row
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from tests.tiny import CHATML, make_tokenizer

USER, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "Why?"), ("assistant", "So."), ("assistant", "No."))
)
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
TOKENIZER = make_tokenizer()
CHAT = ChatFormat(TOKENIZER, "model")

# Reason -> the text of a file with one such row.
LINES = {
    "not_an_object": '["a"]',
    "duplicate_key": '{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
    "not_unicode": r'{"prompt": "\ud83d", "chosen": "c", "rejected": "d"}',
    "too_deep": '{"a": ' + "[" * 400 + "]" * 400 + "}",
}
ROWS: dict[str, dict[str, Any]] = {
    "identical": {**PAIR, "rejected": "So."},
    "no_preference": {"prompt": "q", "response_a": "a", "response_b": "b", "winner": "tie"},
    "shape": {"text": "plain"},
    "ambiguous": {**PAIR, "instruction": "Sum it up."},
    "ambiguous_turn": {
        **PAIR,
        "chosen": [{"role": "assistant", "content": "a", "value": "b"}],
    },
    "unsupported": {**PAIR, "documents": [{"text": "page"}]},
    "images": {**PAIR, "images": ["a.png"]},
    "candidates": {**PAIR, "chosen": ["a", "b"]},
    "token_ids": {**PAIR, "chosen": [1, 2]},
    "not_text": {**PAIR, "chosen": 3},
    "unknown_role": {**PAIR, "prompt": [{"role": "robot", "content": "?"}]},
    "two_systems": {
        **PAIR,
        "system": "A.",
        "prompt": [{"role": "system", "content": "B."}, USER],
    },
    "empty_prompt": {**PAIR, "prompt": " "},
    "empty": {**PAIR, "rejected": " \n"},
    "no_answer": {**PAIR, "rejected": None},
    "not_assistant": {**PAIR, "chosen": [USER]},
    "assistant_first": {"prompt": [YES, USER], "chosen": [YES], "rejected": [NO]},
    "two_answers": {"chosen": [USER, YES, YES], "rejected": [USER, YES, NO]},
    "prompt_mismatch": {"prompt": "Who?", "chosen": [USER, YES], "rejected": [USER, NO]},
    "no_shared_prompt": {
        "chosen": [USER, YES],
        "rejected": [{"role": "user", "content": "Who?"}, NO],
    },
}
# Reason -> a template that gives it.
TEMPLATES = {
    "template": CHATML.replace(
        "{{ '<|im_start|>'", "{{ message.x.y if message.content == 'So.' }}{{ '<|im_start|>'", 1
    ),
    "not_rendered": CHATML.replace("+ message['content']", "+ message.content[:2]"),
    "rewritten": CHATML.replace("+ '\n' +", "+ (messages | length) ~ '\n' +"),
    "boundary": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' says' }}{% else %}"
        "{{ ' the' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' t' }}{% endif %}"
    ),
    "no_end": (
        "{% for m in messages %}{% if m.content != 'So.' %}"
        "{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    ),
}
LIMITS = {
    "prompt_too_long": Limits(2, 5000),
    "too_long": Limits(None, 15),
}


def dropped_by(tokenizer: Any, limits: Limits, rows: list[dict[str, Any]], **options: Any) -> str:
    given_rows = (Row(row, f"d.jsonl, line {n}") for n, row in enumerate(rows, start=1))
    found = read_conversations(given_rows, Reading(), Survey())
    *_, last = Tokenizer(ChatFormat(tokenizer, "model"), limits, **options).tokenize(found)
    assert isinstance(last, DroppedPair)
    return last.reason


def of_template(template: str, rows: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return dropped_by(tokenizer, Limits(None, 5000), rows, **options)


def of_file(file: Path, content: str, **reading: Any) -> str:
    file.write_text(content)
    (found,) = read_source(str(file), None, Reading(**reading))
    assert isinstance(found, DroppedPair)
    return found.reason


def in_train() -> str:
    rows = [Row(PAIR, "d.jsonl, line 1")]
    found = list(read_conversations(iter(rows), Reading(), Survey()))
    assert isinstance(found[0], Conversation)
    (dropped,) = without_leaks(found, {found[0].prompt_key})
    assert isinstance(dropped, DroppedPair)
    return dropped.reason


def unreadable(file: Path) -> str:
    """A time that no calendar has, within a column of objects."""
    times = pa.array([2**62], pa.timestamp("ms"))
    metadata = pa.StructArray.from_arrays([times], ["at"])
    pq.write_table(pa.table({"prompt": ["q"], "metadata": metadata}), file)
    (found,) = read_source(str(file))
    assert isinstance(found, DroppedPair)
    return found.reason


def test_every_reason_has_a_row_that_gives_it(tmp_path):
    refuses = CHATML.replace(
        "{% for",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{% for",
        1,
    )
    found = {
        **{reason: of_file(tmp_path / "d.jsonl", line + "\n") for reason, line in LINES.items()},
        **{
            reason: of_file(tmp_path / "d.jsonl", json.dumps(row) + "\n")
            for reason, row in ROWS.items()
        },
        **{reason: of_template(template, [PAIR]) for reason, template in TEMPLATES.items()},
        **{reason: dropped_by(TOKENIZER, limits, [PAIR]) for reason, limits in LIMITS.items()},
        "wrong_fields": of_file(tmp_path / "d.csv", "prompt,chosen,rejected\na,b\n"),
        "unreadable": unreadable(tmp_path / "d.parquet"),
        "missing_field": of_file(tmp_path / "d.jsonl", json.dumps(PAIR), columns={"chosen": "x"}),
        "undesirable": of_file(
            tmp_path / "d.jsonl",
            json.dumps({"prompt": "q", "completion": "a", "label": False}),
            turns="all",
        ),
        "duplicate": dropped_by(TOKENIZER, Limits(None, 5000), [PAIR, PAIR]),
        "in_train": in_train(),
        "system": of_template(refuses, [{**PAIR, "system": "A."}], system="drop"),
    }
    assert found == {reason: reason for reason in REASONS}


def test_every_reason_says_what_happened_without_a_full_stop():
    for reason in REASONS.values():
        assert reason.text
        assert not reason.text.endswith(".")
        assert not reason.remedy.endswith(".")
    assert all(text and not text.endswith(".") for text in NOTES.values())


# --- nothing else comes of any row

NAMES = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "question",
        "system",
        "tools",
        "history",
        "response",
        "completion",
        "label",
        "answers",
        "response_a",
        "response_b",
        "winner",
        "response_1",
        "response_2",
        "preference_strength",
        "generations",
        "ratings",
        "completions",
        "overall_score",
        "rank",
        "answer",
        "role",
        "content",
        "from",
        "value",
        "tool_calls",
        "weight",
        "score_chosen",
        "score_rejected",
        "images",
        "context",
        "text",
        "type",
        "name",
        "reasoning_content",
    ]
)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(
    [
        "user",
        "assistant",
        "system",
        "human",
        "gpt",
        "tool",
        "[{",
        '[{"role": "user", "content": 3}]',
        "\n\nHuman: a\n\nAssistant: b",
        "Human: Assistant:",
        "model_a",
        "tie",
        "{}",
        "null",
        "",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | SCALARS,
            "content": TEXTS | SCALARS,
        },
        optional={"tool_calls": SCALARS | st.lists(SCALARS), "name": SCALARS, "weight": SCALARS},
    ),
    max_size=4,
)
VALUES = st.recursive(
    SCALARS | MESSAGES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | TEXTS, inner, max_size=4),
    max_leaves=8,
)
ROW = st.dictionaries(NAMES, VALUES, max_size=6) | st.fixed_dictionaries(
    {"prompt": VALUES, "chosen": MESSAGES | VALUES, "rejected": MESSAGES | VALUES},
    optional={"system": VALUES, "tools": VALUES, "history": VALUES, "messages": VALUES},
)


@pytest.mark.parametrize("turns", [None, "last", "all"])
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(row=ROW)
def test_any_row_is_a_conversation_that_tokenizes_or_is_dropped(turns, row):
    survey = Survey()
    reading = Reading(turns=turns, pairs_per_prompt=3, metadata=("label", "messages.role"))
    found = list(read_conversations(iter([Row(row, "d.jsonl, line 1")]), reading, survey))
    assert all(isinstance(item, (Conversation, DroppedPair)) for item in found)
    assert found
    assert {item.reason for item in found if isinstance(item, DroppedPair)} <= REASONS.keys()
    assert survey.notes.keys() <= NOTES.keys()
    assert json.dumps(survey.as_json())
    tokenizer = Tokenizer(CHAT, Limits(None, 40, truncation="keep_end", truncate_answers=True))
    for item in tokenizer.tokenize(found):
        assert isinstance(item, (TokenizedPair, DroppedPair))
        assert len(item.pair_id) in (0, 16)


COLUMNS = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "system", "messages", "completion"]),
    st.sampled_from(
        ["prompt", "a.0", "chosen.-1.content", "messages.0", "answers.0.answer", ".", ""]
    ),
)


@settings(max_examples=200, deadline=None)
@given(row=ROW, columns=COLUMNS)
def test_any_mapping_of_any_row_is_a_conversation_or_dropped(row, columns):
    reading = Reading(columns=columns)
    found = list(read_conversations(iter([Row(row, "d.jsonl, line 1")]), reading, Survey()))
    assert all(isinstance(item, (Conversation, DroppedPair)) for item in found)
