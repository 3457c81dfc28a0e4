"""An HTTP/1.1 proxy that passes everything on unchanged, or does one thing wrong on purpose.

It stands between an S3 client and an object store. Each client's connection has one connection to
the server and one thread; bodies pass through piece by piece.
"""

import socket
import threading
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from urllib.parse import parse_qsl, urlsplit

from benchmarks.faults.chance import Chance, Draw
from benchmarks.faults.wire import Head, Peer, first_to_send, marked

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_ERRORS = {
    "error_500": (
        "500 Internal Server Error",
        "InternalError",
        "We encountered an internal error. Please try again.",
    ),
    "slow_down_503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
}
# What a GET of a key with one of these in its query reads is about the object, not the object.
_ABOUT_OBJECTS = {"uploadId", "acl", "tagging", "attributes", "retention", "legal-hold", "torrent"}


class FaultyProxy:
    """The proxy, on a free port of this machine; a context manager.

    A request gets at most one fault. Where the drawn one does not apply (no body, not the read of
    an object), the request passes unchanged and nothing is counted.
    """

    def __init__(
        self,
        target_host: str,
        target_port: int,
        faults: Mapping[str, float] | None = None,
        seed: int = 0,
        stall_seconds: float = 2.0,
    ) -> None:
        """Take the port; requests are served once the context is entered.

        Args:
            target_host: the server's host.
            target_port: the server's port.
            faults: the probability of each of ``chance.FAULTS`` for a request; together at most 1.
            seed: of the draws. What a request gets is fixed by it and by how many came before.
            stall_seconds: the length of a stall.
        """
        self._chance = Chance(faults or {}, seed, stall_seconds)
        self._target = (target_host, target_port)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._open: dict[_Connection, threading.Thread] = {}
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self.port: int = self._listener.getsockname()[1]

    @property
    def endpoint(self) -> str:
        """The address for the client."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def faults(self) -> Mapping[str, float]:
        """The probability of each fault; another mapping may be assigned while the proxy runs."""
        return self._chance.faults

    @faults.setter
    def faults(self, faults: Mapping[str, float]) -> None:
        self._chance.faults = faults

    @property
    def counts(self) -> Counter[str]:
        """How often each fault was injected so far; a copy."""
        return self._chance.counts

    @property
    def requests(self) -> int:
        """How many requests came so far, with a fault or without."""
        return self._chance.requests

    def __enter__(self) -> "FaultyProxy":
        self._acceptor.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._chance.end_stalls()
        self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake the acceptor
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            left = dict(self._open)
        # What a stall held back is still on its way: to be handed on before its sockets are shut.
        stalled = bool(self.counts.get("stall"))
        for connection, thread in left.items():
            thread.join(1.0 if stalled else 0.0)
            connection.wake()
            thread.join()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                continue
            connection = _Connection(self._chance, client, self._target)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                self._open[connection] = thread
            thread.start()

    def _serve(self, connection: "_Connection") -> None:
        try:
            connection.serve()
        finally:
            with self._lock:
                del self._open[connection]


class _Reset(Exception):
    """The client's connection is to be reset."""


class _Connection:
    """A client's connection, and the one to the server that is its own."""

    def __init__(self, chance: Chance, client: socket.socket, target: tuple[str, int]) -> None:
        self._chance = chance
        self._target = target
        self._client = Peer(client)
        self._server: Peer | None = None

    def wake(self) -> None:
        for peer in (self._client, self._server):
            if peer is not None:
                peer.wake()

    def serve(self) -> None:
        """Pass on one request after the other, until one end ends it or a fault does."""
        reset = False
        try:
            self._server = Peer(socket.create_connection(self._target))
            while self._exchange(self._server):
                pass
        except (_Reset, OSError, ValueError):  # a server that is down or broke off looks the same
            reset = True
        finally:
            self._client.close(reset)
            if self._server is not None:
                self._server.close()

    def _exchange(self, server: Peer) -> bool:
        """Serve one request; whether the connection may go on."""
        # Between requests a server has nothing to say but its end, which is the client's end, too.
        if first_to_send(server, self._client) is server:
            return False
        request = self._client.head()
        if request is None:
            return False
        draw = self._chance.draw()
        if draw.fault == "reset_before":
            self._chance.count(draw.fault)
            raise _Reset
        if draw.fault in _ERRORS:
            self._refuse(request, draw.fault)
            return not request.closes
        answer, in_step = self._forward(server, request, draw)
        return self._respond(server, request, answer, draw) and in_step

    def _refuse(self, request: Head, fault: str) -> None:
        """Take the request's body from the client and answer with an error of our own."""
        if request.awaits_leave:
            self._client.send(_CONTINUE)
        for _ in self._client.pieces(request.request_body()):
            pass
        status, code, message = _ERRORS[fault]
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
            f"<Message>{message}</Message><RequestId>injected</RequestId></Error>"
        )
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
            "x-amz-request-id: injected\r\n\r\n"
        )
        self._chance.count(fault)
        self._client.send((head if request.method == "HEAD" else head + body).encode())

    def _forward(self, server: Peer, request: Head, draw: Draw) -> tuple[Head, bool]:
        """Pass the request on; the answer's head, and whether the connections are still in step."""
        server.send(request.raw)
        # A client tires of waiting for leave and then sends its body without.
        if request.awaits_leave and first_to_send(server, self._client) is server:
            answer = server.answer()
            if answer.status != 100:
                return answer, True  # then no body follows
            self._client.send(answer.raw)
        in_step = self._forward_body(server, request, draw)
        answer = server.answer()
        while answer.status < 200:
            self._client.send(answer.raw)
            answer = server.answer()
        return answer, in_step

    def _forward_body(self, server: Peer, request: Head, draw: Draw) -> bool:
        body = request.request_body()
        pieces = self._client.pieces(body)
        for piece, is_place in marked(pieces, body.length, draw.place):
            if is_place and draw.fault == "wrong_request":
                self._chance.count(draw.fault)
                piece = _different(piece)
            try:
                server.send(piece)
            except ConnectionError:
                return False  # it hung up on the body; what it answered before may still be read
        return True

    def _respond(self, server: Peer, request: Head, answer: Head, draw: Draw) -> bool:
        """Pass the answer on; whether the connection may go on."""
        body = answer.answer_body(request.method)
        fault = draw.fault if _applies(draw.fault, request, answer) else ""
        pieces = server.pieces(body)
        if fault == "reset_after":
            for _ in pieces:  # some servers begin to answer before they are done
                pass
            self._chance.count(fault)
            raise _Reset
        if fault == "stall" and (body.is_empty or not draw.in_body):
            self._chance.stall()
            fault = ""
        self._client.send(answer.raw)
        for piece, is_place in marked(pieces, body.length, draw.place):
            if is_place and fault == "truncated":
                self._chance.count(fault)
                return False
            if is_place and fault == "stall":
                self._chance.stall()
            elif is_place and fault:
                self._chance.count(fault)
                piece = _different(piece)
            self._client.send(piece)
        return not (request.closes or answer.closes or body.ends_with_connection)


def _applies(fault: str, request: Head, answer: Head) -> bool:
    """Whether this answer can have the fault, leaving aside whether it has a body."""
    is_object = _reads_object(request) and answer.status in (200, 206)
    if fault == "wrong_response":
        return is_object
    if fault == "wrong_xml":
        return not is_object and "xml" in answer.fields.get("content-type", "")
    return fault in ("reset_after", "stall", "truncated")


def _reads_object(request: Head) -> bool:
    target = urlsplit(request.target)
    names = {name for name, _ in parse_qsl(target.query, keep_blank_values=True)}
    key = target.path.lstrip("/").partition("/")[2]
    return request.method == "GET" and key != "" and not names & _ABOUT_OBJECTS


def _different(piece: bytes) -> bytes:
    """The piece with another first byte; the next one, so that XML often stays well-formed."""
    return bytes([piece[0] ^ 1]) + piece[1:]
