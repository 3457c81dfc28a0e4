"""Reasons an example is left out for, and what each means for the run.

A *bad* row is one that the reader cannot use. Bad rows are dropped and counted, and a run stops
when one reason takes more than `data.max_bad_share` of the rows. The other reasons are ordinary:
the row is sound, and the recipe's settings leave it out.
"""

from typing import Any, NamedTuple

from fpo_core.data.lengths import ExampleLengths


class Reason(NamedTuple):
    """Why examples are left out."""

    text: str  # completes "dropped: ..."
    bad: bool = True
    remedy: str = ""  # what to do about it, where the row itself does not say


_TOO_LONG = (
    "Raise max_length or max_prompt_length, or cut the texts (truncation=keep_end, "
    "truncate_answers=true)"
)
_MAP = "Say where the fields are (columns={prompt: ..., chosen: ..., rejected: ...})"
_TEMPLATE = "Use a model or template that renders it (data.template), or leave out such rows"

REASONS: dict[str, Reason] = {
    # Rows that are sound.
    "identical": Reason("chosen and rejected are the same", bad=False),
    "duplicate": Reason("the same pair occurred before", bad=False),
    "in_train": Reason(
        "a held-out pair whose prompt is in the training data",
        bad=False,
        remedy="Give other held-out data, or data.heldout={fraction: 0.05}",
    ),
    "prompt_too_long": Reason("the prompt alone is too long", bad=False, remedy=_TOO_LONG),
    "too_long": Reason(
        "prompt and response are longer than max_length", bad=False, remedy=_TOO_LONG
    ),
    "undesirable": Reason("the answer is labelled as undesirable", bad=False),
    "no_preference": Reason("the row prefers neither answer", bad=False),
    "system": Reason("the template takes no system turn (data.system=drop)", bad=False),
    "boundary": Reason("a token spans the prompt's end and the response's start", bad=False),
    # Rows that cannot be read.
    "not_an_object": Reason("the row is not an object"),
    "duplicate_key": Reason("a key occurs twice in the row"),
    "not_unicode": Reason("a text is not valid Unicode"),
    "too_deep": Reason("the row is nested too deeply"),
    "wrong_fields": Reason("the row has another number of fields than the header"),
    "unreadable": Reason("the row is damaged"),
    "missing_field": Reason("a column that the mapping names is not in the row", remedy=_MAP),
    # Rows of a shape that is not known or not usable.
    "shape": Reason("the row has no known shape", remedy=_MAP),
    "ambiguous": Reason("several columns could be the prompt", remedy=_MAP),
    "unsupported": Reason("a column changes the prompt and cannot be used"),
    "images": Reason("the row has images, audio or video"),
    "candidates": Reason("a side is a list of several answers", remedy=_MAP),
    "token_ids": Reason("a side is a list of numbers, not text"),
    "not_text": Reason("a text is a number or another value"),
    "unknown_role": Reason("a turn has an unknown role or none"),
    "ambiguous_turn": Reason("a turn says two different things"),
    "two_systems": Reason("the row has two different system prompts"),
    # Conversations that cannot be learnt from.
    "empty_prompt": Reason("the prompt is empty"),
    "empty": Reason("a response is empty"),
    "no_answer": Reason("a response has no assistant turn"),
    "not_assistant": Reason("a response does not begin with an assistant turn"),
    "assistant_first": Reason("the dialogue begins with an assistant turn"),
    "two_answers": Reason("two assistant turns follow each other"),
    "prompt_mismatch": Reason("the sides answer another prompt than the row's"),
    "no_shared_prompt": Reason("the two sides share no prompt"),
    # Conversations that the template cannot render whole.
    "template": Reason("the chat template refuses the conversation", remedy=_TEMPLATE),
    "not_rendered": Reason(
        "the chat template leaves out part of the conversation", remedy=_TEMPLATE
    ),
    "rewritten": Reason("the chat template renders the prompt differently with an answer"),
    "no_end": Reason("the chat template writes nothing after an answer"),
}


class Unusable(Exception):
    """A row, or an answer of it, that cannot be used.

    Attributes:
        reason: a key of `REASONS`.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail or REASONS[reason].text


class DroppedPair(NamedTuple):
    """An example that was left out, and why."""

    pair_id: str  # empty where the row could not be read
    reason: str
    where: str
    detail: str
    lengths: ExampleLengths | None = None  # None: it was not tokenized

    def as_json(self) -> dict[str, Any]:
        """Return the line of dropped.jsonl."""
        tokens = self.lengths and [self.lengths.prompt, *self.lengths.answers]
        return {**self._asdict(), "lengths": tokens}
