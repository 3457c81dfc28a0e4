"""Tokenized pairs: true prefixes, the end of turn, and the reasons that pairs are dropped for."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_core.data.pairs import PreferencePair
from fpo_core.data.tokenize import ChatFormat, DroppedPair, Limits, TokenizedPair, tokenize_pairs
from fpo_core.errors import FPOError
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
LIMITS = Limits(64, 128)
WORDS = st.text(alphabet="abc fox\n.é", min_size=1, max_size=30).filter(str.strip)


def pair(prompt: str = "why", chosen: str = "fox", rejected: str = "dog") -> PreferencePair:
    return PreferencePair(
        ({"role": "user", "content": prompt},), chosen, rejected, "d.jsonl, line 1"
    )


def one(given_pair: PreferencePair, limits: Limits = LIMITS, template: str = "model", **options):
    (found,) = tokenize_pairs([given_pair], ChatFormat(TOKENIZER, template), limits, **options)
    return found


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
    ("given_pair", "limits", "reason", "detail"),
    [
        (pair(chosen="dog"), LIMITS, "identical", "the same"),
        (pair(chosen=" \n"), LIMITS, "empty", "no text"),
        (pair("why " * 40), LIMITS, "prompt_too_long", "data.max_prompt_length is 64"),
        (pair(rejected="dog " * 120), LIMITS, "too_long", "data.max_length is 128"),
    ],
)
def test_dropped_pairs_say_why(given_pair, limits, reason, detail):
    found = one(given_pair, limits)
    assert isinstance(found, DroppedPair)
    assert found.reason == reason
    assert detail in found.detail
    assert found.where == "d.jsonl, line 1"


def test_repeated_pairs_and_heldout_pairs_of_the_training_data_are_dropped():
    chat = ChatFormat(TOKENIZER, "model")
    seen = list(tokenize_pairs([pair(), pair()], chat, LIMITS))
    assert sorted(str(getattr(found, "reason", None)) for found in seen) == ["None", "duplicate"]
    dropped = one(pair(), exclude=frozenset({seen[0].pair_id}))
    assert isinstance(dropped, DroppedPair)
    assert dropped.reason == "in_train"


def test_a_tokenizer_that_merges_across_the_boundary_drops_the_pair():
    """A template that ends the prompt in a space, which BPE joins with the answer's first word."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' says' }}{% else %}"
        "{{ ' the' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' t' }}{% endif %}"
    )
    (found,) = tokenize_pairs([pair()], ChatFormat(tokenizer, "model"), LIMITS)
    assert isinstance(found, DroppedPair)
    assert found.reason == "boundary"


def test_a_tokenizer_without_a_template_says_what_to_set():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(FPOError, match="no chat template; set data.template=halos"):
        ChatFormat(tokenizer, "model")


def test_a_template_that_refuses_or_never_ends_an_answer_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(FPOError, match=r"between d\.jsonl, line 1 and d\.jsonl.*no system turns"):
        list(tokenize_pairs([pair()], ChatFormat(tokenizer, "model"), LIMITS))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (found,) = tokenize_pairs([pair()], ChatFormat(tokenizer, "model"), LIMITS)
    assert isinstance(found, DroppedPair)
    assert found.reason == "no_end"


@pytest.mark.parametrize("template", ["model", "halos"])
def test_prompts_are_shown_without_the_template(template):
    chat = ChatFormat(TOKENIZER, template)
    found = one(pair("What is it?"), template=template)
    assert chat.shown_prompt(found.prompt_ids) == "What is it?"
