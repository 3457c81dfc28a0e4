"""Render a conversation and find where each answer begins and ends in its text.

Nothing is searched for in the text. The template renders every beginning of the conversation that
ends at an answer's edge, and each has to be a beginning of the whole.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Conversation, Turn
from fpo_core.data.drops import Unusable
from fpo_core.data.left_out import check_rendered
from fpo_core.data.render import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.recipe.data import SystemRule


class Rendered(NamedTuple):
    """The texts of one conversation. All are beginnings of a side's text."""

    conversation: Conversation
    prompt: str
    sides: tuple[tuple[str, ...], ...]  # per side: opener, end, opener, end, ... of its answers

    @property
    def texts(self) -> list[str]:
        """Return all texts, the prompt's first."""
        return [self.prompt, *(text for side in self.sides for text in side)]


class Renderer:
    """Renders the conversations of a data set with one template.

    Args:
        chat: chat template and tokenizer.
        system: what happens to a system turn that the template does not take.
    """

    def __init__(self, chat: ChatFormat, system: SystemRule) -> None:
        self.chat, self.system = chat, system
        self._asked: tuple[tuple[list[Turn], list[Any]], str] | None = None
        self._noted: set[str] = set()  # about the conversation at hand

    def render(self, given: Conversation) -> tuple[Rendered, set[str]]:
        """Render a conversation; returns its texts and what is worth a note, keys of `NOTES`.

        Raises:
            Unusable: the template refuses the conversation, or leaves out part of it.
            FPOError: a system turn that the template does not take, with `data.system=refuse`.
        """
        self._noted = set()
        rendered = self._rendered(self.with_system_rule(given))
        wholes = [side[-1] for side in rendered.sides]
        self._noted |= check_rendered(self.chat, rendered.conversation, wholes)
        return rendered, self._noted

    def with_system_rule(self, given: Conversation) -> Conversation:
        """Apply `data.system` where the template takes no system turn.

        Raises:
            Unusable: the row is to be left out.
            FPOError: the rule is `refuse`.
        """
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

    def _rendered(self, given: Conversation) -> Rendered:
        """Render the prompt and, of each side, every beginning that ends at an answer's edge."""
        edges = [self._edges(given, side) for side in given.sides]
        answered_first = all(side[0].role == ASSISTANT for side in given.sides)
        prompt = edges[0][0] if answered_first else self._unanswered(given, edges[0][-1])
        for side in edges:
            if not all(side[-1].startswith(text) for text in (prompt, *side)):
                raise Unusable("rewritten")
        if len({side[0] for side in edges}) > 1 and answered_first:
            raise Unusable("rewritten")
        return Rendered(given, prompt, tuple(map(tuple, edges)))

    def _unanswered(self, given: Conversation, whole: str) -> str:
        """Return the text of a prompt that a side does not answer at once."""
        text = self.chat.render(given.prompt, given.tools)
        last = given.prompt[-1]
        if whole.startswith(text) or last.role != ASSISTANT:
            return text
        before = given.prompt[:-1]
        return self._stop(self._start(before, given.tools, whole), before, last, given, whole)

    def _edges(self, given: Conversation, side: tuple[Turn, ...]) -> list[str]:
        """Return the beginnings of a side's text at the start and the end of each answer."""
        turns = given.whole(side)
        first = len(turns) - len(side)  # one earlier than the prompt's end where it is prefilled
        whole = self.chat.up_to_end(self.chat.render(turns, given.tools))
        edges: list[str] = []
        for place, turn in enumerate(turns):
            if turn.role != ASSISTANT or place < first:
                continue
            before = turns[:place]
            if place < len(given.prompt):
                start = self.chat.render(given.prompt, given.tools, continued=True)
            else:
                start = self._start(before, given.tools, whole)
            is_last = place == len(turns) - 1
            edges += [start, whole if is_last else self._stop(start, before, turn, given, whole)]
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
