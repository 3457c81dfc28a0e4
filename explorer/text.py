"""Token ids as pieces of text that are safe to show: bounded, and nothing in them invisible."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LONGEST = 200  # characters of one piece that are shown
_NEWLINE = "⏎"
# Characters that show nothing, or change the direction of what is around them.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_REPLACEMENT = "\ufffd"
_CHARACTER_TOKENS = 4  # a character has four bytes at most, and a token one at least


def visible(text: str, longest: int = LONGEST) -> str:
    """A text with every character to be seen: controls by their code, at most so many characters.

    Args:
        text: anything, hostile text from data included.
        longest: characters that are shown; more are counted.
    """
    # Before the characters are looked at: a piece may be of 100,000.
    shown = "".join(map(_visible_character, text[:longest]))
    return shown if len(text) <= longest else f"{shown}… (+{len(text) - longest:,})"


def _visible_character(character: str) -> str:
    if character == "\n":
        return _NEWLINE
    if character == "\t":
        return "⇥"
    if unicodedata.category(character) in _HIDDEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character


class Detokenizer:
    """Pieces of text for token ids; the ids themselves where no tokenizer could be read.

    Args:
        folder: of the model, with its ``tokenizer.json``; None: there is none.
        note: why there is none, for people.
    """

    def __init__(self, folder: Path | None, note: str | None = None) -> None:
        self.note = note
        self._tokenizer: Any = None
        self._known: dict[int, str] = {}
        if folder is None:
            return
        try:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # noqa: BLE001  the library raises bare Exception
            self.note = f"the tokenizer cannot be read ({visible(str(error))}): ids are shown"

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """A piece for each id, in order; safe to show once it is escaped.

        A character of several tokens is given to the last of them, the others are ``·``.
        """
        ids = [int(one) for one in ids]
        if self._tokenizer is None:
            return [f"⟨{one}⟩" for one in ids]
        raw = [self._raw(one) for one in ids]
        free = 0  # the first token that is not part of a character yet
        for end, piece in enumerate(raw):
            if _REPLACEMENT not in piece:
                free = end + 1
                continue
            for start in range(max(free, end + 1 - _CHARACTER_TOKENS), end):
                whole = self._decode(ids[start : end + 1])
                if _REPLACEMENT not in whole:
                    raw[start : end + 1] = ["·"] * (end - start) + [whole]
                    free = end + 1
                    break
        return [visible(piece) for piece in raw]

    def _raw(self, one: int) -> str:
        if one not in self._known:
            self._known[one] = self._decode([one])
        return self._known[one]

    def _decode(self, ids: Sequence[int]) -> str:
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        except (OverflowError, TypeError):  # no id that a tokenizer could have
            return "".join(f"⟨{one}⟩" for one in ids)

    def text(self, ids: Iterable[int], longest: int = 200) -> str:
        """The beginning of a text, on one line."""
        ids = [int(one) for one in ids]
        if self._tokenizer is None:
            return visible(" ".join(map(str, ids[:longest])), longest)
        return visible(self._decode(ids[:longest]), longest)
