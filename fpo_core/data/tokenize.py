"""Tokenize conversations: once, here, and never from text again downstream.

The prompt's tokens must be a true prefix of prompt + response on both sides, so that log-probs
are of the response alone. A pair where the tokenizer merges across the boundary is dropped with
its reason, as is one that is too long, empty or without preference.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from fpo_core.data.conversations.model import ASSISTANT, Conversation, Turn
from fpo_core.data.drops import DroppedPair, Unusable
from fpo_core.data.lengths import ExampleLengths
from fpo_core.data.render import MARK, ChatFormat
from fpo_core.data.rendered import Rendered, Renderer
from fpo_core.data.truncation import Cut, Limits, PromptTools, cut_pair
from fpo_core.recipe.data import SystemRule

CHUNK = 256  # conversations per tokenizer call: the tokenizer is faster on many texts


class TokenizedPair(NamedTuple):
    """A pair as token ids: the prompt with BOS and turn opener, responses with the end of turn.

    The ranges are flat, start, stop, start, stop, ..., and hold a side's tokens that are not
    scored (other speakers' turns).
    """

    pair_id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]  # empty where there is nothing to compare with
    chosen_unscored: list[int]
    rejected_unscored: list[int]
    conversation: Conversation
    lengths: ExampleLengths  # before anything was cut

    @property
    def num_scored(self) -> int:
        """Return the scored tokens of the sides together."""
        ranges = (self.chosen_unscored, self.rejected_unscored)
        unscored = sum(sum(each[1::2]) - sum(each[::2]) for each in ranges)
        return len(self.chosen_ids) + len(self.rejected_ids) - unscored

    @property
    def kept_lengths(self) -> ExampleLengths:
        """Return the tokens that are kept."""
        answers = [ids for ids in (self.chosen_ids, self.rejected_ids) if ids]
        return ExampleLengths(len(self.prompt_ids), tuple(map(len, answers)))


class Tokenizer:
    """Tokenizes the conversations of one split after the other.

    Args:
        chat: chat template and tokenizer.
        limits: length limits.
        system: what happens to a system turn that the template does not take.

    Attributes:
        notes: examples by note, keys of `NOTES`.
    """

    def __init__(self, chat: ChatFormat, limits: Limits, system: SystemRule = "refuse") -> None:
        chat.check_ends()
        self.chat, self.limits = chat, limits
        self.notes: Counter[str] = Counter()
        self._renderer = Renderer(chat, system)
        self._seen: set[int] = set()
        (self._end,) = chat.ids([chat.end])

    def tokenize(
        self, conversations: Iterable[Conversation | DroppedPair]
    ) -> Iterator[TokenizedPair | DroppedPair]:
        """Tokenize conversations in their order; what was dropped before passes through.

        Raises:
            FPOError: a system turn that the template does not take, with `data.system=refuse`.
        """
        stream = iter(conversations)
        while chunk := list(islice(stream, CHUNK)):
            yield from self._chunk(chunk)

    def _chunk(
        self, chunk: list[Conversation | DroppedPair]
    ) -> Iterator[TokenizedPair | DroppedPair]:
        rendered = [self._render(each) for each in chunk]
        found = (each for each in rendered if isinstance(each, Rendered))
        texts = list(dict.fromkeys(text for each in found for text in each.texts))
        ids = dict(zip(texts, self.chat.ids(texts), strict=True))
        for each in rendered:
            if isinstance(each, DroppedPair):
                yield each
                continue
            try:
                yield self._pair(each, [ids[text] for text in each.texts])
            except Unusable as unusable:
                prompt = len(ids[each.prompt])
                answers = tuple(len(ids[side[-1]]) - prompt for side in each.sides)
                lengths = ExampleLengths(prompt, answers)
                yield _dropped(each.conversation, unusable, lengths)

    def _render(self, each: Conversation | DroppedPair) -> Rendered | DroppedPair:
        if isinstance(each, DroppedPair):
            return each
        try:
            rendered, noted = self._renderer.render(each)
        except Unusable as unusable:
            return _dropped(each, unusable)
        self.notes.update(noted)
        return rendered

    def _pair(self, rendered: Rendered, ids: list[list[int]]) -> TokenizedPair:
        prompt, *rest = ids
        answers: list[list[int]] = []
        unscored: list[list[int]] = []
        for side in rendered.sides:
            edges, rest = rest[: len(side)], rest[len(side) :]
            whole = edges[-1]
            starts = edges[:-1] if edges[0] is prompt else [prompt, *edges[:-1]]
            if any(whole[: len(edge)] != edge for edge in starts):
                raise Unusable("boundary")
            answers.append(whole[len(prompt) :])
            unscored.append(_unscored([len(edge) - len(prompt) for edge in edges]))
        if len(answers) == 2 and answers[0] == answers[1]:
            raise Unusable("identical", "chosen and rejected have the same tokens")
        if not all(answers):
            raise Unusable("no_end")
        tools = PromptTools(encode=self._prompt_ids, around=self._around)
        pair = Cut(prompt, answers, unscored)
        cut = cut_pair(pair, rendered.conversation, self.limits, self._end, tools)
        self._note_cut(cut, prompt, answers)
        self._check_duplicate(cut)
        lengths = ExampleLengths(len(prompt), tuple(map(len, answers)))
        return _tokenized(rendered.conversation, cut, lengths)

    def _note_cut(self, cut: Cut, prompt: list[int], answers: list[list[int]]) -> None:
        self.notes["prompt_cut"] += cut.prompt is not prompt
        self.notes["answer_cut"] += cut.answers is not answers

    def _check_duplicate(self, cut: Cut) -> None:
        # 64 bits, not the ids: two of ten million pairs are alike once in 300,000 runs.
        key = hash((tuple(cut.prompt), *map(tuple, cut.answers)))
        if key in self._seen:
            raise Unusable("duplicate")
        self._seen.add(key)

    def _prompt_ids(self, turns: Sequence[Turn], tools: Sequence[Any]) -> list[int]:
        (ids,) = self.chat.ids([self._opened_for_answer(turns, tools)])
        return ids

    def _opened_for_answer(self, turns: Sequence[Turn], tools: Sequence[Any]) -> str:
        """Render a prompt that was cut, with the opener that an answered conversation has."""
        opened = self.chat.render(turns, tools, opener=True)
        answered = self.chat.render([*turns, Turn(ASSISTANT, MARK)], tools)
        if answered.startswith(opened):
            return opened
        return self.chat.render(turns, tools) + self.chat.opener

    def _around(self, turns: Sequence[Turn], tools: Sequence[Any]) -> tuple[list[int], list[int]]:
        """Return the token ids before and after the text of a prompt's last turn."""
        marked = [*turns[:-1], turns[-1]._replace(content=MARK)]
        before, _, after = self._opened_for_answer(marked, tools).rpartition(MARK)
        ids = self.chat.ids([before, after])
        return ids[0], ids[1]


def _unscored(edges: list[int]) -> list[int]:
    """Return the ranges between answers, from the edges of the answers in a side's ids."""
    ranges: list[int] = []
    before = 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if start > before:
            ranges += [before, start]
        before = stop
    return ranges


def _tokenized(given: Conversation, cut: Cut, lengths: ExampleLengths) -> TokenizedPair:
    compared = len(cut.answers) == 2
    return TokenizedPair(
        pair_id=given.pair_id,
        prompt_ids=cut.prompt,
        chosen_ids=cut.answers[0],
        rejected_ids=cut.answers[1] if compared else [],
        chosen_unscored=cut.unscored[0],
        rejected_unscored=cut.unscored[1] if compared else [],
        conversation=given,
        lengths=lengths,
    )


def _dropped(
    given: Conversation, unusable: Unusable, lengths: ExampleLengths | None = None
) -> DroppedPair:
    return DroppedPair(
        pair_id=given.pair_id,
        reason=unusable.reason,
        where=given.where,
        detail=unusable.detail,
        lengths=lengths,
    )
