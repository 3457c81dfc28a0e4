"""A web server on loopback that serves files from memory, with the habits that servers have."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Web:
    """What the server has, how it answers, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.changed = 1_700_000_000.0  # of every file, in seconds
        self.status = 200  # of every answer
        self.head_status = 200  # of answers to HEAD only, as for addresses signed for GET
        self.marks = {"ETag", "Last-Modified"}
        self.cut_off = 0  # bytes that are missing at the end
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []

    def fetched(self) -> int:
        """Return how many files were sent since the last call."""
        count = sum(request.startswith("GET ") for request in self.requests)
        self.requests.clear()
        return count


@contextmanager
def serving(web: Web, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve while the context is open; gives the server's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web.requests.append(f"{self.command} {self.path}")
            web.headers.append(dict(self.headers))
            path = self.path.partition("?")[0]
            data = web.files.get(path)
            status = web.status if self.command == "GET" else max(web.status, web.head_status)
            if path.startswith("/again/"):
                self._answer(302, {"Location": self.path}, b"")
            elif path.startswith("/to/"):
                self._answer(302, {"Location": "/" + path.removeprefix("/to/")}, b"")
            elif status != 200 or data is None:
                self._answer(status if status != 200 else 404, {}, b"none")
            else:
                marks = {
                    "ETag": f'"{md5(data, usedforsecurity=False).hexdigest()}"',
                    "Last-Modified": formatdate(web.changed, usegmt=True),
                }
                self._answer(200, {key: marks[key] for key in marks.keys() & web.marks}, data)

        do_HEAD = do_GET

        def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[: len(body) - web.cut_off])
                if web.cut_off:
                    self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
