"""Tokenized pairs: true prefixes, the end of turn, and the reasons that pairs are dropped for."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Conversation, Turn
from fpo_core.data.drops import DroppedPair
from fpo_core.data.lengths import ExampleLengths
from fpo_core.data.mixture import without_leaks
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import CHUNK, TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.errors import FPOError
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
LIMITS = Limits(64, 128)
WORDS = st.text(alphabet="abc fox\n.é", min_size=1, max_size=30).filter(str.strip)


def pair(prompt: str = "why", chosen: str = "fox", rejected: str = "dog") -> Conversation:
    sides = [(Turn(ASSISTANT, text),) for text in (chosen, rejected)]
    return Conversation((Turn(USER, prompt),), sides[0], sides[1], "d.jsonl, line 1")


def tokenized(pairs, limits: Limits = LIMITS, template: str = "model", tokenizer: Any = TOKENIZER):
    return list(Tokenizer(ChatFormat(tokenizer, template), limits).tokenize(pairs))


def one(given_pair: Conversation, limits: Limits = LIMITS, template: str = "model"):
    (found,) = tokenized([given_pair], limits, template)
    return found


@settings(deadline=None)
@given(WORDS, WORDS, WORDS)
def test_ids_are_those_of_the_whole_conversation(prompt, chosen, rejected):
    """Against transformers' own tokenization of the templated conversation in one go."""
    if chosen == rejected:
        return
    found = one(pair(prompt, chosen, rejected), Limits(500, 1000))
    assert isinstance(found, TokenizedPair)
    for text, ids in ((chosen, found.chosen_ids), (rejected, found.rejected_ids)):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        encoding: Any = TOKENIZER.apply_chat_template(turns, tokenize=True)
        whole = encoding["input_ids"]
        newline = TOKENIZER("\n", add_special_tokens=False)["input_ids"]
        assert found.prompt_ids + ids + newline == whole
        assert ids[-1] == TOKENIZER.eos_token_id
        assert TOKENIZER.decode(ids[:-1]) == text


def test_the_halos_template_ends_answers_with_eos():
    found = one(pair(), template="halos")
    assert TOKENIZER.decode(found.prompt_ids) == "<|im_start|><|user|>\nwhy\n<|assistant|>\n"
    assert TOKENIZER.decode(found.chosen_ids) == "fox<|im_end|>"


@pytest.mark.parametrize(
    ("given_pair", "reason", "detail"),
    [
        (pair("why " * 40), "prompt_too_long", "data.max_prompt_length is 64"),
        (pair(rejected="dog " * 120), "too_long", "data.max_length is 128"),
    ],
)
def test_pairs_that_do_not_fit_say_why_and_how_long_they_are(given_pair, reason, detail):
    found = one(given_pair)
    assert isinstance(found, DroppedPair)
    assert found.reason == reason
    assert detail in found.detail
    assert found.where == "d.jsonl, line 1"
    whole = one(given_pair, Limits(900, 1000))
    assert found.lengths == whole.lengths
    assert found.as_json()["lengths"] == [
        len(whole.prompt_ids),
        len(whole.chosen_ids),
        len(whole.rejected_ids),
    ]


def test_without_a_prompt_limit_only_the_whole_length_counts():
    found = one(pair("why " * 80), Limits(None, 128))
    assert isinstance(found, DroppedPair)
    assert (found.reason, found.detail.partition(", ")[2]) == (
        "prompt_too_long",
        "data.max_length is 128",
    )
    assert one(pair("why " * 20), Limits(None, 128)).lengths.prompt > 64


def test_the_same_ids_are_a_duplicate_and_a_prompt_of_the_training_data_a_leak():
    first, second = tokenized([pair(), pair()])
    assert isinstance(first, TokenizedPair)
    assert isinstance(second, DroppedPair)
    assert second.reason == "duplicate"
    trained = {pair().prompt_key}
    (dropped,) = tokenized(without_leaks([pair()._replace(where="h.jsonl, line 1")], trained))
    assert isinstance(dropped, DroppedPair)
    assert (dropped.reason, dropped.where) == ("in_train", "h.jsonl, line 1")


def test_duplicates_are_found_across_the_chunks_and_the_splits_of_one_tokenizer():
    tokenizer = Tokenizer(ChatFormat(TOKENIZER, "model"), LIMITS)
    many = [pair(f"why {number}") for number in range(CHUNK + 1)]
    found = list(tokenizer.tokenize([*many, many[0]]))
    assert [item.pair_id for item in found] == [item.pair_id for item in [*many, many[0]]]
    assert [number for number, item in enumerate(found) if isinstance(item, DroppedPair)] == [
        CHUNK + 1
    ]
    (again,) = tokenizer.tokenize([many[7]])
    assert isinstance(again, DroppedPair)


def test_a_tokenizer_that_merges_across_the_boundary_drops_the_pair():
    """A template that ends the prompt in a space, which BPE joins with the answer's first word."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' says' }}{% else %}"
        "{{ ' the' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' t' }}{% endif %}"
    )
    (found,) = tokenized([pair()], tokenizer=tokenizer)
    assert isinstance(found, DroppedPair)
    assert found.reason == "boundary"


def test_a_tokenizer_without_a_template_says_what_to_set():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(FPOError, match="no chat template; set data.template=halos"):
        ChatFormat(tokenizer, "model")


def test_a_template_that_refuses_everything_or_never_ends_an_answer_is_named_before_any_row():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('nothing pleases me') }}"
    with pytest.raises(FPOError, match="refuses it: nothing pleases me"):
        tokenized([pair()], tokenizer=tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    with pytest.raises(FPOError, match=r"writes nothing after an answer.*data\.template"):
        tokenized([pair()], tokenizer=tokenizer)


@pytest.mark.parametrize("template", ["model", "halos"])
def test_prompts_are_shown_without_the_template(template):
    chat = ChatFormat(TOKENIZER, template)
    found = one(pair("What is it?"), template=template)
    assert chat.shown_prompt(found.prompt_ids) == "What is it?"


def test_lengths_count_what_was_kept_and_what_there_was():
    found = one(pair(rejected="dog " * 20))
    assert found.lengths == found.kept_lengths
    assert found.kept_lengths == ExampleLengths(
        len(found.prompt_ids), (len(found.chosen_ids), len(found.rejected_ids))
    )
    assert found.lengths.longest == len(found.prompt_ids) + len(found.rejected_ids)


def test_a_template_that_forgets_the_system_turn_once_it_is_answered_takes_none():
    """As Mistral's, which puts it into the last user turn, and that only if nothing follows."""
    template = TOKENIZER.chat_template.replace(
        "message['content']",
        "((messages[0].content + ' ') if loop.last and message.role == 'user' and "
        "messages[0].role == 'system' else '') + message['content']",
    ).replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'system' %}"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer, "model")
    assert "brief" in chat.render([Turn(SYSTEM, "Be brief."), Turn(USER, "a")], opener=True)
    assert not chat.takes_system
    asked = pair()._replace(prompt=(Turn(SYSTEM, "Be brief."), Turn(USER, "why")))
    (found,) = Tokenizer(chat, LIMITS, "fold").tokenize([asked])
    assert isinstance(found, TokenizedPair)
    assert "Be brief.\n\nwhy" in chat.tokenizer.decode(found.prompt_ids)
