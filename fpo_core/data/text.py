"""Text for training SAEs: files of several kinds, as token windows of one length."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fpo_core.data.conversations.model import ASSISTANT, USER, Conversation, Turn
from fpo_core.data.conversations.reader import Reading, Survey, read_source
from fpo_core.data.drops import REASONS, Unusable
from fpo_core.data.render import ChatFormat
from fpo_core.data.rendered import Renderer
from fpo_core.data.sources.identity import Resolved
from fpo_core.data.sources.row import Row
from fpo_core.data.sources.rows import read_rows
from fpo_core.errors import FPOError
from fpo_core.recipe.data import SystemRule
from fpo_core.recipe.schema import SaeTextSettings

log = logging.getLogger("fpo.data")

_KINDS = "text, instruction, preference or arena"
_NOT_OF_KIND = (KeyError, TypeError, IndexError, ValueError)


class Documents:
    """Reads the documents of text sources, conversations rendered as the pairs are.

    Args:
        chat: the recipe's chat template and the model's tokenizer.
        system: what happens to a system turn that the template does not take.

    Attributes:
        refused: conversations that were left out, by the reason.
    """

    def __init__(self, chat: ChatFormat, system: SystemRule = "refuse") -> None:
        self.chat = chat
        self.refused: Counter[str] = Counter()
        self._renderer = Renderer(chat, system)

    def read(self, source: SaeTextSettings, resolved: Resolved | None = None) -> Iterator[str]:
        """Yield the texts of one source.

        A preference pair gives two texts, a dialogue one.

        Raises:
            FPOError: no row of the source is of its kind, or a system turn that the template does
                not take, with `data.system=refuse`.
        """
        if source.kind == "text":
            yield from (_text(row, source.kind) for row in read_rows(source.path, resolved))
            return
        if source.kind == "arena":
            read = (_answered(row, source.kind) for row in read_rows(source.path, resolved))
        else:
            read = _conversations(source, resolved)
        for given in read:
            try:
                given = self._renderer.with_system_rule(given)
                texts = [self.chat.render(given.whole(side), given.tools) for side in given.sides]
            except Unusable as unusable:
                self.refused[unusable.detail] += 1
            else:
                yield from texts


def _conversations(source: SaeTextSettings, resolved: Resolved | None) -> Iterator[Conversation]:
    """Yield the conversations of a source; rows that cannot be read are counted in one warning."""
    survey = Survey()
    reading = Reading(turns="last" if source.kind == "instruction" else None)
    found = 0
    first = ""
    for item in read_source(source.path, resolved, reading, survey):
        if not isinstance(item, Conversation):
            first = first or f"{item.where}: {item.detail}"
            continue
        found += 1
        yield item
    if not found:
        raise FPOError(
            f"data {source.path!r}: no row is of kind {source.kind!r}. {first}. Set the source's "
            f"`kind` to what the file holds: {_KINDS}"
        )
    for reason, count in survey.dropped.items():
        log.warning("%s: %d rows left out: %s", source.path, count, REASONS[reason].text)


def _text(row: Row, kind: str) -> str:
    try:
        text = row.value["text"]
        if not isinstance(text, str):
            raise TypeError(f"`text` is {type(text).__name__}")
        return text
    except _NOT_OF_KIND as error:
        raise _other_kind(row, kind, error) from error


def _answered(row: Row, kind: str) -> Conversation:
    """Return an Arena-Hard answer with its question."""
    try:
        question, answer = row.value["messages"]
        asked = Turn(USER, question["content"])
        return Conversation(
            (asked,), (Turn(ASSISTANT, answer["content"]["answer"]),), None, row.where
        )
    except _NOT_OF_KIND as error:
        raise _other_kind(row, kind, error) from error


def _other_kind(row: Row, kind: str, error: Exception) -> FPOError:
    return FPOError(
        f"{row.where}: not a row of kind {kind!r} ({error}). Set the source's `kind` to what the "
        f"file holds: {_KINDS}"
    )


def token_windows(
    sources: tuple[SaeTextSettings, ...],
    documents: Documents,
    *,
    length: int,
    max_tokens: int,
    resolved: Mapping[str, Resolved] | None = None,
) -> Tensor:
    """Cut the text of all sources, in a fixed shuffled order, into token windows.

    Each window begins as the pairs do: with BOS where the chat template writes it, and BOS is
    nowhere else between documents. A document's remainder is joined with the next one's start, so
    that nothing is padded.

    Args:
        sources: text sources.
        documents: reads them.
        length: tokens per window, BOS included; two at least.
        max_tokens: most tokens in all windows together.
        resolved: the files of sources that are not local.

    Returns:
        Token ids [windows, length] int64.

    Raises:
        FPOError: a source cannot be read, or there is too little text for two windows.
    """
    texts = [
        text
        for source in sources
        for text in documents.read(source, (resolved or {}).get(source.path))
    ]
    for detail, count in documents.refused.items():
        log.warning("%d conversations left out: %s", count, detail)
    bos = list(documents.chat.bos)
    own = length - len(bos)  # tokens of a window that are text
    most = max_tokens // length
    stream: list[int] = []
    for index in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist():
        ids = documents.chat.tokenizer(texts[index], add_special_tokens=False)["input_ids"]
        stream += ids[len(bos) :] if ids[: len(bos)] == bos else ids
        if len(stream) >= most * own:
            break
    count = min(len(stream) // own, most)
    if count < 2:
        raise FPOError(
            f"the SAE's text gives {len(stream)} tokens, too few for two windows of {length} (at "
            f"most sae.train.max_tokens={max_tokens} are taken)"
        )
    log.info("%d documents, %d tokens, %d windows of %d", len(texts), len(stream), count, length)
    text = torch.tensor(stream[: count * own], dtype=torch.int64).view(count, own)
    return torch.cat([torch.tensor(bos, dtype=torch.int64).expand(count, -1), text], dim=1)
