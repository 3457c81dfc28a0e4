"""Render conversations with a chat template, and turn the text into token ids.

What the template writes around an answer (its opener, its end of turn) is found by rendering a
marked conversation. Lists of special tokens do not tell: some tokenizers leave the end of turn
out of theirs, and some templates end a turn with plain text.
"""

import datetime as dt
import logging
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

from jinja2 import TemplateError

from fpo_core.data.conversations.model import ASSISTANT, SYSTEM, USER, Message, Turn
from fpo_core.data.drops import Unusable
from fpo_core.data.encode import Encoder
from fpo_core.errors import FPOError

log = logging.getLogger("fpo.data")

MARK = "\N{REPLACEMENT CHARACTER}"  # stands for a text where the template is taken apart
_DIRECTIVES = "wdmyYHIMSfzZjUWGuVeFTRD"  # of strftime, the same in every language
_PADDED = "dmyHIMSj"  # `%-d` has no zero in front
_PERCENT = "\0"  # stands for `%%`
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
# What a template's own code can raise on a conversation that it does not expect.
_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatFormat:
    """Turns conversations into token ids with one chat template.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: `model` (the tokenizer's own) or `halos` (the paper's, for base models).
        date: the date that a template which writes one gets, YYYY-MM-DD; None: today.

    Raises:
        FPOError: the tokenizer lacks a chat template, or the end-of-sequence token that `halos`
            writes.
    """

    def __init__(self, tokenizer: Any, template: str, date: str | None = None) -> None:
        if template == "model" and not tokenizer.chat_template:
            raise FPOError(
                "the model's tokenizer has no chat template; set data.template=halos (base models)"
            )
        if template == "halos" and tokenizer.eos_token is None:
            raise FPOError(
                "data.template=halos ends answers with the tokenizer's eos_token, and this "
                "tokenizer has none. Set it in the model folder's tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.template = template
        self._encoder = Encoder(tokenizer)
        self._date = dt.date.fromisoformat(date) if date else None

    def render(
        self,
        turns: Sequence[Turn],
        tools: Sequence[Any] = (),
        *,
        opener: bool = False,
        continued: bool = False,
    ) -> str:
        """Render turns as the template does.

        Args:
            turns: the conversation.
            tools: tool descriptions for the template.
            opener: end with the opener of an assistant turn.
            continued: leave the last turn open, as a partial answer.

        Raises:
            Unusable: the template refuses the conversation.
        """
        messages = [turn.message for turn in turns]
        if self.template == "halos":
            text = self._halos(messages, closed=not continued)
            return text + "<|assistant|>\n" if opener else text
        described = list(tools) or None
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=described,
                chat_template=self._dated_template(described),
                tokenize=False,
                add_generation_prompt=opener,
                continue_final_message=continued,
            )
        except _FAULTS as error:
            raise Unusable("template", f"the chat template refuses it: {error}") from error

    def prompt_text(self, prompt: Sequence[Message]) -> str:
        """Return a prompt up to and with the opener of the assistant's turn, for generation.

        Raises:
            FPOError: the template refuses the conversation.
        """
        turns = [Turn(message["role"], message["content"]) for message in prompt]
        try:
            return self.render(turns, opener=True)
        except Unusable as unusable:
            raise FPOError(unusable.detail) from unusable

    def shown_prompt(self, prompt_ids: list[int]) -> str:
        """Return a prompt for people: without what the template writes around one user turn."""
        text = self.tokenizer.decode(prompt_ids)
        before, after = self.prompt_text([{"role": USER, "content": MARK}]).split(MARK)
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)].strip()
        return self.tokenizer.decode(prompt_ids, skip_special_tokens=True).strip()

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Return token ids; the template has already written the special tokens."""
        return self._encoder.ids(texts)

    @cached_property
    def _answered(self) -> tuple[str, str, str]:
        """A marked conversation: before the answer, without the answer, and after it."""
        question, answer = Turn(USER, "a"), Turn(ASSISTANT, MARK)
        before, _, after = self.render([question, answer]).rpartition(MARK)
        return before, self.render([question]), after

    @cached_property
    def opener(self) -> str:
        """What an answered conversation has between the prompt and the answer."""
        before, prompt, _ = self._answered
        return before[len(prompt) :] if before.startswith(prompt) else ""

    @cached_property
    def end(self) -> str:
        """What the template writes after an answer, up to the end of the turn."""
        return self._answered[2].rstrip()

    @cached_property
    def tail(self) -> str:
        """White space after the end of the turn; a model never learns past the end."""
        after = self._answered[2]
        return after[len(after.rstrip()) :]

    @cached_property
    def bos(self) -> tuple[int, ...]:
        """Return the BOS that every rendered text begins with, as token ids; () where none does.

        A token that also opens the answer's turn (ChatML's, in some tokenizers) marks turns, not
        the beginning, even where the tokenizer calls it BOS.

        Raises:
            FPOError: the template refuses a question with an answer, or writes nothing after it.
        """
        self.check_ends()
        bos = self.tokenizer.bos_token_id
        (ids,) = self.ids([self._answered[0]])
        return (bos,) if ids[:1] == [bos] and bos not in ids[1:] else ()

    def up_to_end(self, text: str) -> str:
        """Return a rendered text up to the end of its last turn."""
        return text[: len(text) - len(self.tail)] if text.endswith(self.tail) else text

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template renders a system turn; some leave it out once there is an answer."""
        try:
            turns = [Turn(SYSTEM, MARK), Turn(USER, "a"), Turn(ASSISTANT, "b")]
            return MARK in self.render(turns)
        except Unusable:
            return False

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that become control tokens, wherever they stand."""
        return tuple({*self.tokenizer.all_special_tokens, self.end.strip()} - {""})

    def end_tokens(self) -> tuple[int, ...]:
        """Return the token ids that end an answer: the end of turn, and the tokenizer's EOS.

        Raises:
            FPOError: the template writes nothing after an answer.
        """
        self.check_ends()
        (ids,) = self.ids([self.end])
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] not in self.tokenizer.all_special_ids:
            if eos is None:
                raise FPOError(
                    f"the chat template ends an answer with {self.end!r}, which this tokenizer "
                    f"splits into {len(ids)} tokens, and it has no eos_token. Add the end of turn "
                    f"to its special tokens"
                )
            log.warning(
                "the chat template ends an answer with %r, which is no token of this tokenizer: "
                "answers end at eos_token %r only",
                self.end,
                self.tokenizer.eos_token,
            )
            return (eos,)
        return (ids[-1],) if eos in (None, ids[-1]) else (ids[-1], eos)

    def check_ends(self) -> None:
        """Raise where no answer would ever end.

        Raises:
            FPOError: the template writes nothing after an answer.
        """
        try:
            end = self.end
        except Unusable as unusable:
            raise FPOError(unusable.detail) from unusable
        if not end:
            raise FPOError(
                "the chat template writes nothing after an answer, so that no answer would end. "
                "Use another template (data.template)"
            )

    def _dated_template(self, tools: Sequence[Any] | None) -> str | None:
        """Return the template with the date pinned, None where there is no date to pin."""
        if self._date is None:
            return None
        template = self.tokenizer.get_chat_template(tools=tools)
        return pinned_date(self._date) + template if "strftime_now" in template else None

    def _halos(self, messages: Sequence[Message], *, closed: bool) -> str:
        text = "\n".join(f"<|{turn['role']}|>\n{turn['content']}" for turn in messages)
        answered = bool(messages) and messages[-1]["role"] == ASSISTANT
        ending = (self.tokenizer.eos_token if closed else "") if answered else "\n"
        return (self.tokenizer.bos_token or "") + text + ending


@cache
def pinned_date(date: dt.date) -> str:
    """Return the beginning of a chat template in which `strftime_now` tells a fixed date.

    transformers hands no functions to templates, so it is a macro of the template itself. The
    time of day is midnight.
    """
    moment = dt.datetime.combine(date, dt.time())
    texts = {name: moment.strftime(f"%{name}") for name in _DIRECTIVES}
    texts |= {f"-{name}": texts[name].lstrip("0") or "0" for name in _PADDED}
    texts |= _in_english(moment)
    replaced = "".join(f"|replace('%{name}', '{text}')" for name, text in texts.items())
    replaced = f"|replace('%%', '{_PERCENT}'){replaced}|replace('{_PERCENT}', '%')"
    # The empty expression keeps a line break that the template begins with.
    return (
        f"{{%- macro strftime_now(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro %}}{{{{ '' }}}}"
    )


def _in_english(moment: dt.datetime) -> dict[str, str]:
    """Return what `strftime` writes in the process's language, as the C locale has it."""
    day, month = _DAYS[moment.weekday()], _MONTHS[moment.month - 1]
    time = moment.strftime("%H:%M:%S")
    return {
        "a": day[:3],
        "A": day,
        "b": month[:3],
        "h": month[:3],
        "B": month,
        "p": "AM" if moment.hour < 12 else "PM",
        "c": f"{day[:3]} {month[:3]} {moment.day:>2} {time} {moment.year}",
        "x": moment.strftime("%m/%d/%y"),
        "X": time,
    }
