"""Tokenize conversations: once, here, and never from text again downstream.

The prompt's tokens must be a true prefix of prompt + response on both sides, so that log-probs
are of the response alone. A pair where the tokenizer merges across the boundary is dropped with
its reason, as is one that is too long, empty or without preference.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from fpo_core.data.conversations.messages import REASONING_KEYS
from fpo_core.data.conversations.model import (
    ASSISTANT,
    SYSTEM,
    TOOL,
    USER,
    Conversation,
    Turn,
)
from fpo_core.data.drops import DroppedPair, Unusable
from fpo_core.data.lengths import ExampleLengths
from fpo_core.data.render import MARK, ChatFormat
from fpo_core.data.truncation import Cut, Limits, PromptTools, cut_pair
from fpo_core.errors import FPOError
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


class _Rendered(NamedTuple):
    """The texts of one conversation. All are beginnings of a side's text."""

    conversation: Conversation
    prompt: str
    sides: tuple[tuple[str, ...], ...]  # per side: opener, end, opener, end, ... of its answers


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
        self.chat, self.limits, self.system = chat, limits, system
        self.notes: Counter[str] = Counter()
        special = {*chat.tokenizer.all_special_tokens, chat.end.strip()}
        self._special = [token for token in special if token]
        self._noted: set[str] = set()  # about the conversation at hand
        self._seen: set[int] = set()
        (self._end,) = chat.ids([chat.end])
        self._asked: tuple[tuple[list[Turn], list[Any]], str] | None = None

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
        found = (each for each in rendered if isinstance(each, _Rendered))
        texts = list(dict.fromkeys(text for each in found for text in _texts(each)))
        ids = dict(zip(texts, self.chat.ids(texts), strict=True))
        for each in rendered:
            if isinstance(each, DroppedPair):
                yield each
                continue
            try:
                yield self._pair(each, [ids[text] for text in _texts(each)])
            except Unusable as unusable:
                prompt = len(ids[each.prompt])
                answers = tuple(len(ids[side[-1]]) - prompt for side in each.sides)
                lengths = ExampleLengths(prompt, answers)
                yield _dropped(each.conversation, unusable, lengths)

    def _render(self, each: Conversation | DroppedPair) -> _Rendered | DroppedPair:
        if isinstance(each, DroppedPair):
            return each
        self._noted.clear()
        try:
            rendered = self._rendered(self._with_system_rule(each))
        except Unusable as unusable:
            return _dropped(each, unusable)
        self.notes.update(self._noted)
        return rendered

    def _with_system_rule(self, given: Conversation) -> Conversation:
        """Apply `data.system` where the template takes no system turn."""
        first = given.prompt[0]
        if first.role != SYSTEM or self.chat.takes_system:
            return given
        if self.system == "drop":
            raise Unusable("system")
        if self.system == "refuse":
            raise FPOError(
                f"{given.where}: the row has a system prompt, and the chat template takes none. "
                f"Set data.system=fold to put it into the first user turn, or data.system=drop to "
                f"leave such rows out"
            )
        place = next((n for n, turn in enumerate(given.prompt) if turn.role == USER), None)
        if place is None:
            raise Unusable("not_rendered", "no user turn takes the system prompt")
        asked = given.prompt[place]
        folded = asked._replace(content=f"{first.content}\n\n{asked.content}")
        self._noted.add("folded")
        prompt = (*given.prompt[1:place], folded, *given.prompt[place + 1 :])
        return given._replace(prompt=prompt)

    def _rendered(self, given: Conversation) -> _Rendered:
        """Render the prompt and, of each side, every beginning that ends at an answer's edge."""
        prefilled = given.prompt[-1].role == ASSISTANT and given.chosen[0].role == ASSISTANT
        edges = [
            self._edges(given, side, prefilled=prefilled and side[0].role == ASSISTANT)
            for side in given.sides
        ]
        answered_first = all(side[0].role == ASSISTANT for side in given.sides)
        prompt = edges[0][0] if answered_first else self._unanswered(given, edges[0][-1])
        for side in edges:
            if not all(side[-1].startswith(text) for text in (prompt, *side)):
                raise Unusable("rewritten")
        if len({side[0] for side in edges}) > 1 and answered_first:
            raise Unusable("rewritten")
        self._check_rendered(given, [side[-1] for side in edges])
        return _Rendered(given, prompt, tuple(map(tuple, edges)))

    def _unanswered(self, given: Conversation, whole: str) -> str:
        """Return the text of a prompt that a side does not answer at once."""
        text = self.chat.render(given.prompt, given.tools)
        last = given.prompt[-1]
        if whole.startswith(text) or last.role != ASSISTANT:
            return text
        before = given.prompt[:-1]
        return self._stop(self._start(before, given.tools, whole), before, last, given, whole)

    def _edges(self, given: Conversation, side: tuple[Turn, ...], *, prefilled: bool) -> list[str]:
        """Return the beginnings of a side's text at the start and the end of each answer."""
        turns = list(given.prompt)
        if prefilled:
            turns, side = turns[:-1], (_continued(given.prompt[-1], side[0]), *side[1:])
        edges: list[str] = []
        whole = self.chat.up_to_end(self.chat.render([*turns, *side], given.tools))
        for place, turn in enumerate(side):
            if turn.role == ASSISTANT:
                before = [*turns, *side[:place]]
                if prefilled and place == 0:
                    start = self.chat.render(given.prompt, given.tools, continued=True)
                else:
                    start = self._start(before, given.tools, whole)
                last = place == len(side) - 1
                edges += [start, whole if last else self._stop(start, before, turn, given, whole)]
        return edges

    def _stop(
        self, start: str, before: Sequence[Turn], turn: Turn, given: Conversation, whole: str
    ) -> str:
        """Return the text up to the end of an answer that other turns follow."""
        answered = self.chat.up_to_end(self.chat.render([*before, turn], given.tools))
        if whole.startswith(answered):
            return answered
        # Some templates end only the last turn: the answer's own text is all there is.
        return start + turn.content.rstrip()

    def _start(self, before: Sequence[Turn], tools: Sequence[Any], whole: str) -> str:
        """Return the text before an answer, with the assistant's opener."""
        asked = self._opened(before, tools)
        if whole.startswith(asked):
            return asked
        # Some templates open a thought for generation, which an answered conversation has not.
        plain = self.chat.render(before, tools) + self.chat.opener
        if not whole.startswith(plain):
            raise Unusable("rewritten")
        self._noted.add("opener")
        return plain

    def _opened(self, before: Sequence[Turn], tools: Sequence[Any]) -> str:
        """Render turns with the assistant's opener; both sides ask for the same prompt."""
        key = (list(before), list(tools))
        if self._asked is None or self._asked[0] != key:
            self._asked = key, self.chat.render(before, tools, opener=True)
        return self._asked[1]

    def _check_rendered(self, given: Conversation, texts: list[str]) -> None:
        """Raise where the template leaves out what changes the prompt or an answer."""
        for side, text in zip(given.sides, texts, strict=True):
            self._check_turns(given, side, text)
        if given.tools and texts[0] == self.chat.up_to_end(
            self.chat.render([*given.prompt, *given.chosen])
        ):
            raise Unusable("not_rendered", "the chat template does not render `tools`")
        for side, text in zip(given.sides, texts, strict=True):
            self._check_extras(given, side, text)
            if any(turn.content.strip() not in text for turn in side):
                self._noted.add("answer_shortened")
            if side[-1].content.rstrip().endswith(self.chat.end.strip()):
                self._noted.add("doubled_end")
        written = [turn.content for turn in given.prompt]
        written += [turn.content for side in given.sides for turn in side]
        if any(token in content for content in written for token in self._special):
            self._noted.add("special_tokens")

    def _check_turns(self, given: Conversation, side: tuple[Turn, ...], text: str) -> None:
        """Raise where a turn is not rendered.

        Templates may leave out part of an earlier answer (its thoughts), or quote what a tool says.
        """
        turns = [*given.prompt, *side]
        if given.prompt[-1].role == side[0].role == ASSISTANT:
            turns[len(given.prompt) - 1 : len(given.prompt) + 1] = [
                _continued(given.prompt[-1], side[0])
            ]
        for place, turn in enumerate(turns):
            said = turn.content.strip()
            # A tool says little, which may stand elsewhere too.
            if not said or (turn.role != TOOL and said in text):
                continue
            other = [*turns[:place], turn._replace(content=MARK), *turns[place + 1 :]]
            if turn.role in (SYSTEM, USER) or self._renders_as(other, given.tools, text):
                what = {ASSISTANT: "the text of an assistant"}.get(turn.role, f"a {turn.role}")
                raise Unusable("not_rendered", f"the chat template leaves out {what} turn")
            if turn.role == ASSISTANT and place < len(given.prompt):
                self._noted.add("earlier_shortened")

    def _check_extras(self, given: Conversation, side: tuple[Turn, ...], text: str) -> None:
        """Raise where tool calls or reasoning are not rendered.

        Templates may leave out the reasoning of earlier turns, as their models are used.
        """
        turns = [*given.prompt, *side]
        for place, turn in enumerate(turns):
            for name, _ in turn.extra:
                if name in ("name", "tool_call_id"):
                    continue
                if name in REASONING_KEYS and place < len(given.prompt):
                    continue
                rest = tuple(item for item in turn.extra if item[0] != name)
                without = [*turns[:place], turn._replace(extra=rest), *turns[place + 1 :]]
                if self._renders_as(without, given.tools, text):
                    raise Unusable("not_rendered", f"the chat template does not render `{name}`")

    def _renders_as(self, turns: list[Turn], tools: Sequence[Any], text: str) -> bool:
        try:
            return self.chat.up_to_end(self.chat.render(turns, tools)) == text
        except Unusable:
            return False  # the template needs what was left out

    def _pair(self, rendered: _Rendered, ids: list[list[int]]) -> TokenizedPair:
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


def _texts(rendered: _Rendered) -> list[str]:
    return [rendered.prompt, *(text for side in rendered.sides for text in side)]


def _continued(partial: Turn, rest: Turn) -> Turn:
    return rest._replace(content=partial.content + rest.content)


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
