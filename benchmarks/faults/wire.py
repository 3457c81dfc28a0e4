"""HTTP/1.1 as it goes over a connection: heads, and how bodies are framed."""

import contextlib
import select
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

_PIECE = 64 * 1024
_LONGEST_LINE = 64 * 1024


class Body(NamedTuple):
    """How a body is framed."""

    length: int | None  # of its data; None where only its end will tell
    chunked: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no body, as far as the head tells."""
        return self.length == 0

    @property
    def ends_with_connection(self) -> bool:
        """Whether nothing but the connection's end marks the body's end."""
        return self.length is None and not self.chunked


class Head(NamedTuple):
    """A request's or an answer's first lines."""

    raw: bytes
    first: list[str]  # the words of the first line
    fields: dict[str, str]  # names in lower case

    @property
    def method(self) -> str:
        """Of a request."""
        return self.first[0]

    @property
    def target(self) -> str:
        """Of a request."""
        return self.first[1]

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.first[1])

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        return "close" in self.fields.get("connection", "").lower() or "HTTP/1.0" in self.first

    @property
    def awaits_leave(self) -> bool:
        """Whether this request's body is held back until the server says 100 Continue."""
        return "100-continue" in self.fields.get("expect", "").lower()

    def request_body(self) -> Body:
        """The body of this request."""
        return self._body(otherwise=0)

    def answer_body(self, method: str) -> Body:
        """The body of this answer.

        Args:
            method: the request's.
        """
        if method == "HEAD" or self.status < 200 or self.status in (204, 304):
            return Body(0)
        return self._body(otherwise=None)

    def _body(self, otherwise: int | None) -> Body:
        if "chunked" in self.fields.get("transfer-encoding", "").lower():
            return Body(None, chunked=True)
        length = self.fields.get("content-length")
        return Body(otherwise if length is None else int(length))


class Peer:
    """One end of a connection. A message that breaks off raises ConnectionError."""

    def __init__(self, link: socket.socket) -> None:
        # Heads and bodies go out one after the other; neither shall wait for the other's receipt.
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.link = link
        self._stream = link.makefile("rb")

    def head(self) -> Head | None:
        """The next head; None where the connection ended instead."""
        lines = [self._stream.readline(_LONGEST_LINE)]
        if not lines[0]:
            return None
        while lines[-1].strip():
            lines.append(self._line())
        if lines[0].count(b" ") < 2:
            raise ConnectionError("what came is not HTTP")
        first, *rest = (line.decode("latin-1").strip() for line in lines[:-1])
        pairs = (field.partition(":") for field in rest)
        fields = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return Head(b"".join(lines), first.split(" ", 2), fields)

    def answer(self) -> Head:
        """The next head, which has to come."""
        head = self.head()
        if head is None:
            raise ConnectionError("the connection ended instead of an answer")
        return head

    def pieces(self, body: Body) -> Iterator[tuple[bytes, bool]]:
        """A body as it comes in, and of each piece whether it is data, not framing.

        Args:
            body: how it is framed.
        """
        if body.chunked:
            yield from self._chunks()
        elif body.length is None:
            while piece := self._stream.read1(_PIECE):
                yield piece, True
        else:
            yield from self._data(body.length)

    def send(self, data: bytes) -> None:
        """Send all of it.

        Args:
            data: the bytes.
        """
        self.link.sendall(data)

    def wake(self) -> None:
        """Let a thread that waits for this peer see its end."""
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)

    def close(self, reset: bool = False) -> None:
        """End the connection.

        Args:
            reset: by RST, which the other end sees as an error.
        """
        if reset:
            with contextlib.suppress(OSError):
                self.link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._stream.close()
        self.link.close()

    def _chunks(self) -> Iterator[tuple[bytes, bool]]:
        size = -1
        while size:
            line = self._line()
            yield line, False
            size = int(line.partition(b";")[0], 16)
            if size:
                yield from self._data(size)
                yield self._line(), False
        trailer = self._line()
        while trailer.strip():
            yield trailer, False
            trailer = self._line()
        yield trailer, False

    def _data(self, left: int) -> Iterator[tuple[bytes, bool]]:
        while left:
            piece = self._stream.read1(min(left, _PIECE))
            if not piece:
                raise ConnectionError("the connection ended within a body")
            left -= len(piece)
            yield piece, True

    def _line(self) -> bytes:
        line = self._stream.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise ConnectionError("the connection ended within a message")
        return line


def first_to_send(preferred: Peer, other: Peer) -> Peer:
    """Wait until one of two has sent something, or ended.

    Args:
        preferred: returned when both have.
        other: the other.
    """
    poll = select.poll()
    poll.register(preferred.link, select.POLLIN)
    poll.register(other.link, select.POLLIN)
    ready = {number for number, _ in poll.poll()}
    return preferred if preferred.link.fileno() in ready else other


def marked(
    pieces: Iterator[tuple[bytes, bool]], length: int | None, place: float
) -> Iterator[tuple[bytes, bool]]:
    """A body's pieces, cut so that one begins at a chosen byte; of each, whether it is that one.

    Args:
        pieces: as ``Peer.pieces`` gives them.
        length: of the data; where it is None, the byte is one of the first piece's.
        place: the chosen byte's, as a share of the length; below 1.
    """
    chosen: int | None = None
    start = 0
    for piece, is_data in pieces:
        if not is_data:
            yield piece, False
            continue
        if chosen is None:
            chosen = int(place * (length or len(piece)))
        before = chosen - start
        start += len(piece)
        if 0 <= before < len(piece):
            if before:
                yield piece[:before], False
            yield piece[before:], True
        else:
            yield piece, False
