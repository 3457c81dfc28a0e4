"""JSON values one after the other out of a stream, with the faults of single rows."""

import codecs
import io
import json
import re
from typing import Any, NoReturn

from fpo_core.data.sources.kinds import not_utf8_byte
from fpo_core.data.sources.row import Row, RowFault
from fpo_core.errors import FPOError

MAX_DEPTH = 200  # levels; nobody's rows have them, and Python code that walks a row has no more
_BLOCK = 1 << 18
_NEAR_END = 64  # longer than any literal or escape that the end of a buffer can cut
_KINDS = {list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
_KINDS[type(None)] = "null"
_SPACE = re.compile(r"[ \t\n\r\ufeff]*")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{}]', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonParser:
    """Parses rows and finds what is wrong with a single one.

    Control characters in strings are read. A number of more digits than Python parses stays text.
    """

    def __init__(self) -> None:
        self._repeated: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_int=_integer, strict=False
        )

    def row(self, text: str, where: str) -> Row:
        """Parse a text that is one row.

        Args:
            text: the whole row.
            where: its file and line.

        Raises:
            json.JSONDecodeError: it is not JSON.
        """
        self._repeated = None
        try:
            value = self._decoder.decode(text)
        except RecursionError:
            return Row({}, where, _TOO_DEEP)
        return self._checked(value, text, 0, len(text), where)

    def row_at(self, text: str, start: int, where: str) -> tuple[Row, int] | None:
        """Parse the row that begins at a position.

        Args:
            text: may hold more than the row.
            start: position of the row's first character.
            where: the row's file and place.

        Returns:
            The row and the position after it; None where the text ends before the row does.

        Raises:
            json.JSONDecodeError: it is not JSON, or the text ends before the row does.
        """
        self._repeated = None
        try:
            value, end = self._decoder.raw_decode(text, start)
        except RecursionError:
            end = _end_of(text, start)
            return None if end is None else (Row({}, where, _TOO_DEEP), end)
        return self._checked(value, text, start, end, where), end

    def _checked(self, value: Any, text: str, start: int, end: int, where: str) -> Row:
        fault = None
        if not isinstance(value, dict):
            fault = RowFault(
                "not_an_object", f"a row is a JSON object, this is {_KINDS[type(value)]}"
            )
        elif self._repeated is not None:
            fault = RowFault("duplicate_key", f"the key {self._repeated!r} occurs twice")
        elif _is_deep(text, start, end):
            fault = _TOO_DEEP
        elif text.find("\\u", start, end) >= 0 and _SURROGATE.search(text, start, end):
            fault = _surrogate_fault(value)
        return Row(value, where) if fault is None else Row({}, where, fault)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            self._repeated = next(key for key in keys if keys.count(key) > 1)
        return value


class JsonText:
    """Reads a stream block by block and knows the line of every value."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        """Begin at the stream's position.

        Args:
            stream: bytes of UTF-8.
            name: the file's name in messages.
        """
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text, self._position, self._ended = "", 0, False
        self._line, self._column, self._counted = 1, 1, 0  # line and column of text[counted]
        self._lines_read = 0

    @property
    def line(self) -> int:
        """Return the number of the line that reading has come to."""
        return self._place(self._position)[0]

    def next_char(self) -> str:
        """Skip space; return the next character, or nothing at the end."""
        while True:
            found = _SPACE.match(self._text, self._position)
            assert found is not None
            self._position = found.end()
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_on()

    def expect(self, characters: str) -> str:
        """Read one of some characters, after space.

        Raises:
            FPOError: another one is there.
        """
        found = self.next_char()
        if not found or found not in characters:
            self.fail(f"Expecting {' or '.join(map(repr, characters))}")
        self._position += 1
        return found

    def row(self, parser: JsonParser, where: str) -> Row:
        """Read the next row.

        Args:
            parser: finds the faults of the row.
            where: its file and place.

        Raises:
            FPOError: it is not JSON.
        """
        self.next_char()
        while True:
            try:
                found = parser.row_at(self._text, self._position, where)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _NEAR_END or error.msg.startswith("Unterm")
                if self._ended or not cut:
                    self.fail(error.msg, error.pos)
                found = None
            # A number at the end of the buffer may go on in the next block.
            if found and (self._ended or found[1] < len(self._text)):
                self._position = found[1]
                return found[0]
            if self._ended:
                self.fail("the row does not end", self._position)
            self._read_on()

    def fail(self, fault: str, position: int | None = None) -> NoReturn:
        """Raise the error about a position, by default the one that reading has come to."""
        line, column = self._place(self._position if position is None else position)
        raise FPOError(f"{self._name}, line {line}: not JSON ({fault}, column {column})")

    def _place(self, position: int) -> tuple[int, int]:
        """Return line and column of a position that is not before the last one asked for."""
        newlines = self._text.count("\n", self._counted, position)
        if newlines:
            column = position - self._text.rindex("\n", self._counted, position)
        else:
            column = self._column + position - self._counted
        self._line, self._column, self._counted = self._line + newlines, column, position
        return self._line, self._column

    def _read_on(self) -> None:
        """Drop what is behind, and append a block as long as what is ahead."""
        self._place(self._position)
        self._text, self._position, self._counted = self._text[self._position :], 0, 0
        block = self._stream.read(max(_BLOCK, len(self._text)))
        self._ended = not block
        try:
            self._text += self._decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = self._lines_read + 1 + error.object.count(b"\n", 0, error.start)
            raise not_utf8_byte(self._name, line, error) from error
        self._lines_read += block.count(b"\n")


_TOO_DEEP = RowFault("too_deep", f"the row is nested more than {MAX_DEPTH} levels deep")


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # more digits than Python parses
        return digits


def _is_deep(text: str, start: int, end: int) -> bool:
    if text.count("[", start, end) + text.count("{", start, end) <= MAX_DEPTH:
        return False
    depth = 0
    for token in _TOKEN.finditer(text, start, end):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            return True
    return False


def _end_of(text: str, start: int) -> int | None:
    """Return the position after the value that begins at `start`; None where it does not end."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.end()
    return None


def _surrogate_fault(value: dict[str, Any]) -> RowFault | None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        return RowFault("not_unicode", f"{half} is half a character (a lone surrogate)")
    return None
