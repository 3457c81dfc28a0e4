"""Token ids of many texts that share turns: each distinct turn is encoded once.

A tokenizer takes its added tokens out of a text first and encodes the text between them piece by
piece. So a text can be split before such a token, and its ids are those of the pieces in a row.
The prompt of a pair is then encoded once, and not with each of its answers again.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

TRIED_TEXTS = 32


class Encoder:
    """Encodes rendered texts with a tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer; the text has its special tokens already.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        tokens = _breaks(tokenizer)
        # Split before each of them; an empty list of alternatives would split everywhere.
        self._break = re.compile(f"(?={'|'.join(map(re.escape, tokens))})") if tokens else None
        self._is_tried = False

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        found = self._by_pieces(texts)
        if self._break is None or self._is_tried or not texts:
            return found
        # A tokenizer of a kind that nobody thought of: the first texts say whether pieces serve.
        self._is_tried = True
        if found[:TRIED_TEXTS] == self._encoded(list(texts[:TRIED_TEXTS])):
            return found
        self._break = None
        return self._by_pieces(texts)

    def _by_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        split = [self._pieces(text) for text in texts]
        pieces = list(dict.fromkeys(chain.from_iterable(split)))
        ids = dict(zip(pieces, self._encoded(pieces), strict=True))
        return [[*chain.from_iterable(ids[piece] for piece in each)] for each in split]

    def _pieces(self, text: str) -> list[str]:
        return [text] if self._break is None else [one for one in self._break.split(text) if one]

    def _encoded(self, pieces: list[str]) -> list[list[int]]:
        if not pieces:  # transformers' tokenizers fail on an empty list
            return []
        encoded = self.tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)
        return encoded["input_ids"]


def _breaks(tokenizer: Any) -> list[str]:
    """Return the tokens of a chat template that no other token, and no space, reaches across."""
    if not tokenizer.is_fast:
        return []
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    template = str(tokenizer.chat_template)
    return [
        text
        for text, token in added.items()
        if text in template
        and not (token.lstrip or token.single_word or token.normalized)
        and not any(_reaches_into(other, text) for other in added)
    ]


def _reaches_into(token: str, text: str) -> bool:
    """Return whether a token can begin before a text and end within or after it."""
    ends: Iterable[str] = (token[start:] for start in range(1, len(token)))
    return text in token[1:] or any(text.startswith(end) for end in ends)
