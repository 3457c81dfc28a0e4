"""Text for training SAEs: files of several kinds, as token windows of one length."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fpo_core.data.sources.hub import SplitFiles
from fpo_core.data.sources.rows import read_rows
from fpo_core.errors import FPOError
from fpo_core.recipe.schema import SaeTextSettings

log = logging.getLogger("fpo.data")

Messages = list[dict[str, str]]


def documents(source: SaeTextSettings, hub: SplitFiles | None = None) -> Iterator[str | Messages]:
    """The documents of one source: plain text, or conversations for the chat template."""
    for row in read_rows(source.path, hub):
        try:
            yield from _documents_of(row.value, source.kind)
        except (KeyError, TypeError, IndexError) as error:
            raise FPOError(
                f"{row.where}: not a row of kind {source.kind!r} (missing {error}); set the "
                f"source's `kind` to what the file holds: text, instruction, preference or arena"
            ) from error


def _documents_of(row: dict[str, Any], kind: str) -> Iterator[str | Messages]:
    if kind == "text":
        yield row["text"]
    elif kind == "instruction" and "messages" in row:
        yield [_turn(turn["role"], turn["content"]) for turn in row["messages"]]
    elif kind == "instruction":
        request = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
        yield [_turn("user", request), _turn("assistant", row["output"])]
    elif kind == "preference" and "prompt" in row:
        for side in ("chosen", "rejected"):
            if isinstance(row[side], list):  # the whole conversation, as UltraFeedback has it
                yield [_turn(turn["role"], turn["content"]) for turn in row[side]]
            else:
                yield [_turn("user", row["prompt"]), _turn("assistant", row[side])]
    elif kind == "preference":
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        turns = [_turn(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]
        for side in ("chosen", "rejected"):
            yield [*turns, _turn("assistant", row[side]["value"])]
    else:
        question, answer = row["messages"]
        yield [_turn("user", question["content"]), _turn("assistant", answer["content"]["answer"])]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def token_windows(
    sources: tuple[SaeTextSettings, ...],
    tokenizer: Any,
    *,
    length: int,
    max_tokens: int,
    hub: Mapping[str, SplitFiles] | None = None,
) -> Tensor:
    """Token windows [windows, length] from all sources in a fixed shuffled order.

    Documents are cut into windows of exactly ``length`` tokens; a document's remainder is joined
    with the next one's start, so that nothing is padded. Conversations go through the model's own
    chat template, since that is the text the SAE will see. ``hub`` has the files of the sources
    that are splits on the hub.
    """
    stream: list[int] = []
    pieces: list[str] = []
    for source in sources:
        for document in documents(source, (hub or {}).get(source.path)):
            pieces.append(
                document
                if isinstance(document, str)
                else tokenizer.apply_chat_template(document, tokenize=False)
            )
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
