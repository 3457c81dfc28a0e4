"""Rendering: the pinned date, what a template writes around an answer, and what it leaves out."""

import datetime as dt
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.conversations.model import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Conversation,
    Turn,
)
from fpo_core.data.drops import DroppedPair, Unusable
from fpo_core.data.left_out import check_rendered
from fpo_core.data.render import ChatFormat, pinned_date
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.errors import FPOError
from tests.tiny import CHATML, make_tokenizer

FORMS = ("%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A", "%H:%M", "%-d/%-m", "%c|%x|%X|%p", "100%% %F")


def with_template(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def dated(form: str) -> str:
    return "{{ strftime_now(" + json.dumps(form) + ") + '\n' }}" + CHATML


def plain(text: str = "why", chosen: str = "fox", rejected: str = "dog") -> Conversation:
    sides = [(Turn(ASSISTANT, answer),) for answer in (chosen, rejected)]
    return Conversation((Turn(USER, text),), sides[0], sides[1], "d.jsonl, line 1")


def tokenize(given_pair: Conversation, chat: ChatFormat):
    tokenizer = Tokenizer(chat, Limits(None, 5000))
    (found,) = tokenizer.tokenize([given_pair])
    return found, {*+tokenizer.notes}


# --- the date


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("day", ["2026-01-02", "2024-12-31", "2023-10-09"])
def test_a_pinned_date_is_what_strftime_writes_at_its_midnight(form, day):
    chat = ChatFormat(with_template(dated(form)), "model", day)
    midnight = dt.datetime.fromisoformat(day)
    expected = midnight.strftime(form.replace("%-d/%-m", f"{midnight.day}/{midnight.month}"))
    assert chat.render([Turn(USER, "a")]).partition("\n<|im_start|>")[0] == expected


PARTS = st.sampled_from([*(f"%{name}" for name in "dbYmBAHjF%"), "d", "-", " ", "Y", "é"])


@settings(deadline=None)
@given(
    st.dates(dt.date(1990, 1, 1), dt.date(2099, 12, 31)), st.lists(PARTS, max_size=8).map("".join)
)
def test_any_form_of_known_directives_is_written_as_strftime_does(day, form):
    chat = ChatFormat(with_template(dated(form)), "model", day.isoformat())
    written = chat.render([Turn(USER, "a")]).partition("\n<|im_start|>")[0]
    assert written == day.strftime(form)


@pytest.fixture
def zone(monkeypatch) -> Iterator[Callable[[str], None]]:
    """A function that moves this process to another time zone."""

    def move(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


def test_ids_are_the_same_in_another_time_zone(zone):
    """On the two sides of the date line it is another day for a template without a date."""
    texts = []
    for name in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):
        zone(name)
        tokenizer = with_template(dated("%A, %d %b %Y %H"))
        pinned, _ = tokenize(plain(), ChatFormat(tokenizer, "model", "2026-01-02"))
        assert isinstance(pinned, TokenizedPair)
        now = ChatFormat(tokenizer, "model").render([Turn(USER, "a")])
        texts.append((pinned.prompt_ids, now))
    (first, here), (second, there) = texts
    assert first == second
    assert here != there


def test_names_of_days_and_months_are_english_in_every_locale(monkeypatch):
    class Moment(dt.datetime):
        def strftime(self, form: str) -> str:
            return super().strftime(form).replace("Friday", "Freitag").replace("Jan", "Jän")

    monkeypatch.setattr(dt, "datetime", Moment)
    pinned_date.cache_clear()
    try:
        text = ChatFormat(with_template(dated("%A %B %b %c")), "model", "2026-01-02").render(
            [Turn(USER, "a")]
        )
    finally:
        pinned_date.cache_clear()
    assert text.startswith("Friday January Jan Fri Jan  2 00:00:00 2026\n")


def test_a_template_without_a_date_is_the_tokenizers_own():
    tokenizer = make_tokenizer()
    turns = [Turn(SYSTEM, "s"), Turn(USER, "a")]
    with_date = ChatFormat(tokenizer, "model", "2026-01-02").render(turns, opener=True)
    assert with_date == ChatFormat(tokenizer, "model").render(turns, opener=True)


def test_a_template_that_begins_with_a_line_break_keeps_it_under_a_date():
    tokenizer = with_template("\n{{ strftime_now('%Y') }}" + CHATML)
    undated = ChatFormat(tokenizer, "model").render([Turn(USER, "a")])
    pinned = ChatFormat(tokenizer, "model", "2026-01-02").render([Turn(USER, "a")])
    assert pinned.replace("2026", undated.strip()[:4]) == undated


# --- what a template writes around an answer


def test_an_end_of_turn_that_no_list_names_is_found_by_rendering():
    tokenizer = with_template(CHATML.replace("<|im_end|>", "<turn|>"))
    tokenizer.add_tokens(["<turn|>"])  # a token of its own, and not a special one
    chat = ChatFormat(tokenizer, "model")
    found, _ = tokenize(plain(), chat)
    (end,) = tokenizer("<turn|>", add_special_tokens=False)["input_ids"]
    assert end not in tokenizer.all_special_ids
    assert found.chosen_ids[-1] == found.rejected_ids[-1] == end
    assert chat.end_tokens() == (end, tokenizer.eos_token_id)


def test_an_end_of_plain_text_is_kept_and_generation_ends_at_eos():
    tokenizer = with_template(CHATML.replace("<|im_end|>", "###"))
    chat = ChatFormat(tokenizer, "model")
    found, _ = tokenize(plain(), chat)
    assert tokenizer.decode(found.chosen_ids) == "fox###"
    assert chat.end_tokens() == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    with pytest.raises(FPOError, match="splits into 3 tokens, and it has no eos_token"):
        ChatFormat(tokenizer, "model").end_tokens()


def test_answers_follow_the_plain_opener_where_generation_opens_a_thought():
    thinks = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
    tokenizer = with_template(thinks)
    found, notes = tokenize(plain(), ChatFormat(tokenizer, "model"))
    assert tokenizer.decode(found.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(found.chosen_ids) == "fox<|im_end|>"
    assert notes == {"opener"}


def test_a_template_that_cuts_an_answers_thought_is_noted():
    cuts = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    tokenizer = with_template(cuts)
    given_pair = plain(chosen="<think>hm</think>fox")
    found, notes = tokenize(given_pair, ChatFormat(tokenizer, "model"))
    assert tokenizer.decode(found.chosen_ids) == "fox<|im_end|>"
    assert notes == {"answer_shortened"}


def test_answers_that_differ_in_what_the_template_trims_are_identical():
    tokenizer = with_template(CHATML.replace("message['content']", "message['content'] | trim"))
    found, _ = tokenize(plain(chosen="fox", rejected=" fox\n"), ChatFormat(tokenizer, "model"))
    assert isinstance(found, DroppedPair)
    assert found.reason == "identical"


# --- what it refuses or leaves out


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        # Only the last turn is ended: before an answer, the prompt's end is gone.
        (("'<|im_end|>'", "('<|im_end|>' if loop.last else '')"), "rewritten", "differently"),
        (("+ '\n' +", "+ (messages | length) ~ '\n' +"), "rewritten", "differently"),
        (
            ("+ message['content']", "+ ('' if message.role == 'user' else message.content)"),
            "not_rendered",
            "leaves out a user turn",
        ),
    ],
)
def test_a_template_that_cannot_render_a_pair_whole_drops_it(change, reason, detail):
    tokenizer = with_template(CHATML.replace(*change))
    found, _ = tokenize(plain(), ChatFormat(tokenizer, "model"))
    assert isinstance(found, DroppedPair)
    assert found.reason == reason
    assert detail in found.detail


@pytest.mark.parametrize("broken", ["message.nothing.content", "3", "message['content'].z()"])
def test_a_template_that_renders_no_conversation_stops_before_the_first_row(broken):
    tokenizer = with_template(CHATML.replace("+ message['content']", f"+ {broken}"))
    with pytest.raises(FPOError, match="the chat template refuses it: "):
        Tokenizer(ChatFormat(tokenizer, "model"), Limits(None, 5000))


def after(*turns: Turn) -> Conversation:
    answered = plain("And now?")
    return answered._replace(prompt=(Turn(USER, "Is it 8?"), *turns, *answered.prompt))


LOOK, TOLD = Turn(ASSISTANT, "Let me look."), Turn(TOOL, "8")


@pytest.mark.parametrize(
    ("kept", "detail"),
    [
        ("message.role != 'tool'", "leaves out a tool turn"),
        ("message.role != 'assistant' or loop.last", "leaves out the text of an assistant turn"),
    ],
)
def test_an_earlier_turn_that_the_template_leaves_out_drops_the_row(kept, detail):
    """Also where its text stands elsewhere in the prompt."""
    loop = "{% for message in messages %}"
    template = CHATML.replace(loop, f"{loop}{{% if {kept} %}}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    chat = ChatFormat(with_template(template), "model")
    found, _ = tokenize(after(LOOK, TOLD), chat)
    assert isinstance(found, DroppedPair)
    assert (found.reason, detail in found.detail) == ("not_rendered", True)


def test_what_a_template_cuts_from_an_earlier_answer_or_quotes_of_a_tool_is_no_fault():
    cut = "message['content'].split('</think>')[-1]"
    thought = LOOK._replace(content="<think>Hm.</think>Yes.")
    found, notes = tokenize(
        after(thought),
        ChatFormat(with_template(CHATML.replace("message['content']", cut)), "model"),
    )
    assert isinstance(found, TokenizedPair)
    assert notes == {"earlier_shortened"}
    quoted = "(message.content|tojson if message.role == 'tool' else message.content)"
    chat = ChatFormat(with_template(CHATML.replace("message['content']", quoted)), "model")
    found, notes = tokenize(after(LOOK, Turn(TOOL, '{"legs": "8"}')), chat)
    assert isinstance(found, TokenizedPair)
    assert not notes


@pytest.mark.parametrize(
    "error", ["message.x.y", "1 / 0", "[].z()", "'a' + 3", "message['content'].z()"]
)
def test_whatever_a_template_does_wrong_on_a_row_drops_the_row(error):
    body = "{% if message['content'] == 'bad' %}{{ " + error + " }}{% endif %}{{ '<|im_start|>'"
    tokenizer = with_template(CHATML.replace("{{ '<|im_start|>'", body, 1))
    chat = ChatFormat(tokenizer, "model")
    good, _ = tokenize(plain(), chat)
    assert isinstance(good, TokenizedPair)
    with pytest.raises(Unusable) as refused:
        chat.render([Turn(USER, "bad")])
    assert refused.value.reason == "template"
    bad, _ = tokenize(plain("bad"), chat)
    assert isinstance(bad, DroppedPair)
    assert bad.reason == "template"


def test_a_template_that_writes_nothing_for_one_answer_has_no_end_for_it():
    tokenizer = with_template(
        CHATML.replace(
            "{{ '<|im_start|>' + message",
            "{{ '' if message.content == 'fox' else '<|im_start|>' + message",
            1,
        ).replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", "")
    )
    found, _ = tokenize(plain(), ChatFormat(tokenizer, "model"))
    assert isinstance(found, DroppedPair)
    assert found.reason in ("no_end", "rewritten")


def test_a_turn_that_is_left_out_is_found_where_its_text_stands_elsewhere():
    """The system prompt is the word that the user says, too."""
    template = CHATML.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    said = Conversation(
        prompt=(Turn(SYSTEM, "fox"), Turn(USER, "Say fox.")),
        chosen=(Turn(ASSISTANT, "yes"),),
        rejected=(Turn(ASSISTANT, "no"),),
        where="line 1",
    )
    chat = ChatFormat(with_template(template), "model")
    wholes = [chat.up_to_end(chat.render(said.whole(side))) for side in said.sides]
    with pytest.raises(Unusable, match="leaves out a system turn"):
        check_rendered(chat, said, wholes)


@pytest.mark.parametrize("name", ["name", "tool_call_id"])
def test_names_that_the_template_does_not_render_are_noted(name):
    asked = plain()._replace(prompt=(Turn(USER, "why", ((name, "bo"),)),))
    work = Tokenizer(ChatFormat(with_template(CHATML), "model"), Limits(None, 5000))
    (found,) = work.tokenize([asked])
    assert isinstance(found, TokenizedPair)
    assert work.notes["names_left_out"] == 1
