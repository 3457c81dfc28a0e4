"""Text for training SAEs: files of several kinds, as token windows of one length."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fpo_core.data.conversations.model import ASSISTANT, USER, Conversation, Turn
from fpo_core.data.conversations.reader import Reading, Survey, read_source
from fpo_core.data.drops import REASONS, Unusable
from fpo_core.data.render import ChatFormat
from fpo_core.data.sources.identity import Resolved
from fpo_core.data.sources.rows import read_rows
from fpo_core.errors import FPOError
from fpo_core.recipe.schema import SaeTextSettings

log = logging.getLogger("fpo.data")

Turns = tuple[Turn, ...]
_KINDS = "text, instruction, preference or arena"


def documents(source: SaeTextSettings, resolved: Resolved | None = None) -> Iterator[str | Turns]:
    """Yield the documents of one source: plain text, or conversations for the chat template.

    A preference pair gives two conversations, a dialogue one. Rows that cannot be read are
    counted in one warning.

    Raises:
        FPOError: no row of the source is of its kind.
    """
    if source.kind in ("text", "arena"):
        yield from _texts(source, resolved)
        return
    survey = Survey()
    reading = Reading(turns="last" if source.kind == "instruction" else None)
    found = 0
    first = ""
    for item in read_source(source.path, resolved, reading, survey):
        if not isinstance(item, Conversation):
            first = first or f"{item.where}: {item.detail}"
            continue
        for side in item.sides:
            found += 1
            yield (*item.prompt, *side)
    if not found:
        raise FPOError(
            f"data {source.path!r}: no row is of kind {source.kind!r}. {first}. Set the source's "
            f"`kind` to what the file holds: {_KINDS}"
        )
    for reason, count in survey.dropped.items():
        log.warning("%s: %d rows left out: %s", source.path, count, REASONS[reason].text)


def _texts(source: SaeTextSettings, resolved: Resolved | None) -> Iterator[str | Turns]:
    for row in read_rows(source.path, resolved):
        try:
            if source.kind == "text":
                text = row.value["text"]
                if not isinstance(text, str):
                    raise TypeError(f"`text` is {type(text).__name__}")
                yield text
            else:
                question, answer = row.value["messages"]
                yield (
                    Turn(USER, question["content"]),
                    Turn(ASSISTANT, answer["content"]["answer"]),
                )
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise FPOError(
                f"{row.where}: not a row of kind {source.kind!r} ({error}). Set the source's "
                f"`kind` to what the file holds: {_KINDS}"
            ) from error


def token_windows(
    sources: tuple[SaeTextSettings, ...],
    tokenizer: Any,
    *,
    length: int,
    max_tokens: int,
    resolved: Mapping[str, Resolved] | None = None,
) -> Tensor:
    """Return token windows [windows, length] from all sources in a fixed shuffled order.

    Documents are cut into windows of exactly ``length`` tokens; a document's remainder is joined
    with the next one's start, so that nothing is padded. Conversations go through the model's own
    chat template, since that is the text the SAE will see. ``resolved`` has the files of sources
    that are not local.
    """
    stream: list[int] = []
    pieces: list[str] = []
    refused: Counter[str] = Counter()
    chat = ChatFormat(tokenizer, "model") if tokenizer.chat_template else None
    for source in sources:
        for document in documents(source, (resolved or {}).get(source.path)):
            if isinstance(document, str):
                pieces.append(document)
            elif chat is None:
                raise FPOError(f"data {source.path!r}: the model has no chat template to render it")
            else:
                try:
                    pieces.append(chat.render(document))
                except Unusable as unusable:
                    refused[unusable.detail] += 1
    for detail, count in refused.items():
        log.warning("%d conversations left out: %s", count, detail)
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    for index in order:
        stream += tokenizer(pieces[index], add_special_tokens=False)["input_ids"]
        if len(stream) >= max_tokens:
            break
    windows = min(len(stream), max_tokens) // length
    if windows < 2:
        raise FPOError(
            f"the SAE's text gives {len(stream)} tokens, too few for windows of {length}"
        )
    log.info("%d documents, %d tokens, %d windows of %d", len(pieces), len(stream), windows, length)
    return torch.tensor(stream[: windows * length], dtype=torch.int64).view(windows, length)
