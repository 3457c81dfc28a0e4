"""Tokenize preference pairs: once, here, and never from text again downstream.

The prompt's tokens must be a true prefix of prompt + response on both sides, so that log-probs
are of the response alone; a pair where the tokenizer merges across the boundary is dropped with
its reason, as is one that is too long, empty or without preference.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from fpo_core.data.pairs import Message, PreferencePair
from fpo_core.errors import FPOError

Reason = Literal[
    "identical", "empty", "prompt_too_long", "too_long", "boundary", "no_end", "duplicate",
    "in_train",
]  # fmt: skip
REASONS: dict[str, str] = {
    "identical": "chosen and rejected are the same",
    "empty": "a response has no text",
    "prompt_too_long": "the prompt is longer than max_prompt_length",
    "too_long": "prompt and response are longer than max_length",
    "boundary": "the tokenizer merges the prompt's end with the response's start",
    "no_end": "the chat template writes no special token at the end of an answer",
    "duplicate": "the same pair occurred before",
    "in_train": "a held-out pair that is also a training pair",
}


_MARK = "\N{REPLACEMENT CHARACTER}"  # stands for the question where the template is split


class TokenizedPair(NamedTuple):
    """A pair as token ids: the prompt with BOS and turn opener, responses with the end of turn.

    ``rejected_ids`` is empty where there is nothing to compare with.
    """

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    where: str


class DroppedPair(NamedTuple):
    """A pair that was left out, and why."""

    pair_id: str
    reason: Reason
    where: str
    detail: str


class Limits(NamedTuple):
    """Longest prompt, and longest prompt + response, in tokens."""

    max_prompt_length: int
    max_length: int
    section: str = "data"  # of the recipe, for messages


class ChatFormat:
    """Turns conversations into token ids with one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: ``model`` (the tokenizer's own) or ``halos`` (the paper's, for base models).

    Raises:
        FPOError: when the tokenizer has no chat template of its own.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        if template == "model" and not tokenizer.chat_template:
            raise FPOError(
                "the model's tokenizer has no chat template; set data.template=halos (base models)"
            )
        self.tokenizer = tokenizer
        self.template = template

    def prompt_text(self, prompt: tuple[Message, ...]) -> str:
        """The prompt up to and with the opener of the assistant's turn."""
        if self.template == "halos":
            return self._halos(prompt) + "<|assistant|>\n"
        return self.tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=True
        )

    def full_text(self, prompt: tuple[Message, ...], answer: str) -> str:
        """Prompt and answer, closed by the end of turn."""
        turns = [*prompt, {"role": "assistant", "content": answer}]
        if self.template == "halos":
            return self._halos(tuple(turns)) + self.tokenizer.eos_token
        return self.tokenizer.apply_chat_template(turns, tokenize=False)

    def shown_prompt(self, prompt_ids: list[int]) -> str:
        """A prompt for people: without what the template writes around a single user's turn."""
        text = self.tokenizer.decode(prompt_ids)
        before, after = self.prompt_text(({"role": "user", "content": _MARK},)).split(_MARK)
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)].strip()
        return self.tokenizer.decode(prompt_ids, skip_special_tokens=True).strip()

    def _halos(self, turns: tuple[Message, ...]) -> str:
        text = "\n".join(f"<|{turn['role']}|>\n{turn['content']}" for turn in turns)
        return (
            (self.tokenizer.bos_token or "") + text + ("\n" if turns[-1]["role"] == "user" else "")
        )

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids; the template has already written the special tokens."""
        # transformers' fails on a list of none
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def response_ids(self, prompt_ids: list[int], full_ids: list[int]) -> list[int] | None:
        """The response's ids up to its end-of-turn token.

        None where the prompt is no prefix; empty where no special token ends the answer.
        """
        if full_ids[: len(prompt_ids)] != prompt_ids:
            return None
        response = full_ids[len(prompt_ids) :]
        special = set(self.tokenizer.all_special_ids)
        ends = [index for index, token in enumerate(response) if token in special]
        # Some templates write a newline after the end of turn; a model never learns past the end.
        return response[: ends[-1] + 1] if ends else []


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    chat: ChatFormat,
    limits: Limits,
    *,
    exclude: frozenset[str] = frozenset(),
    chunk: int = 256,
) -> Iterator[TokenizedPair | DroppedPair]:
    """Tokenize pairs, chunk by chunk (the tokenizer is faster on many texts).

    Tokenized pairs keep their order; one that is dropped before tokenization may come earlier.

    Args:
        pairs: the pairs.
        chat: chat template and tokenizer.
        limits: length limits.
        exclude: pair ids of the training split, which held-out pairs must not repeat.
        chunk: pairs a tokenizer call.
    """
    seen: set[str] = set()
    held: list[PreferencePair] = []
    for pair in pairs:
        reason = _refusal(pair, seen, exclude)
        if reason:
            yield DroppedPair(pair.pair_id, reason, pair.where, REASONS[reason])
            continue
        seen.add(pair.pair_id)
        held.append(pair)
        if len(held) == chunk:
            yield from _tokenize_chunk(held, chat, limits)
            held = []
    yield from _tokenize_chunk(held, chat, limits)


def _refusal(pair: PreferencePair, seen: set[str], exclude: frozenset[str]) -> Reason | None:
    if pair.chosen == pair.rejected:
        return "identical"
    if not pair.chosen.strip() or (pair.rejected is not None and not pair.rejected.strip()):
        return "empty"
    if pair.pair_id in seen:
        return "duplicate"
    return "in_train" if pair.pair_id in exclude else None


def _tokenize_chunk(
    pairs: list[PreferencePair], chat: ChatFormat, limits: Limits
) -> Iterator[TokenizedPair | DroppedPair]:
    if not pairs:
        return
    try:
        yield from _templated(pairs, chat, limits)
    except TemplateError as error:
        first, last = pairs[0].where, pairs[-1].where
        raise FPOError(
            f"the chat template refuses a conversation between {first} and {last}: {error}. Set "
            f"data.template=halos, or leave out what the template does not know (a system turn, "
            f"say)"
        ) from error


def _templated(
    pairs: list[PreferencePair], chat: ChatFormat, limits: Limits
) -> Iterator[TokenizedPair | DroppedPair]:
    prompts = chat.ids([chat.prompt_text(pair.prompt) for pair in pairs])
    chosen = chat.ids([chat.full_text(pair.prompt, pair.chosen) for pair in pairs])
    compared = [(p.prompt, p.rejected) for p in pairs if p.rejected is not None]
    rejected = iter(chat.ids([chat.full_text(prompt, answer) for prompt, answer in compared]))
    for pair, prompt_ids, chosen_ids in zip(pairs, prompts, chosen, strict=True):
        sides = [chosen_ids] if pair.rejected is None else [chosen_ids, next(rejected)]
        yield _cut(pair, prompt_ids, sides, chat, limits)


def _cut(
    pair: PreferencePair,
    prompt_ids: list[int],
    sides: list[list[int]],
    chat: ChatFormat,
    limits: Limits,
) -> TokenizedPair | DroppedPair:
    def drop(reason: Reason, detail: str) -> DroppedPair:
        return DroppedPair(pair.pair_id, reason, pair.where, detail)

    if len(prompt_ids) > limits.max_prompt_length:
        return drop(
            "prompt_too_long",
            f"the prompt has {len(prompt_ids)} tokens, {limits.section}.max_prompt_length is "
            f"{limits.max_prompt_length}",
        )
    responses = [chat.response_ids(prompt_ids, full) for full in sides]
    found = [response for response in responses if response is not None]
    if len(found) < len(responses):
        return drop("boundary", REASONS["boundary"])
    if not all(found):
        return drop("no_end", REASONS["no_end"])
    longest = len(prompt_ids) + max(map(len, found))
    if longest > limits.max_length:
        given = f"{limits.section}.max_length is {limits.max_length}"
        return drop("too_long", f"{longest} tokens, {given}")
    chosen, rejected = found if len(found) == 2 else (found[0], [])
    return TokenizedPair(pair.pair_id, prompt_ids, chosen, rejected, pair.where)
