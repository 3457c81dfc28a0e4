"""Answers that are framed as the object store's never are, from a small real server."""

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.faults.proxy import FaultyProxy
from tests.faults.plain import different_bytes, raw

BODY = b"hello world"


class Plain(BaseHTTPRequestHandler):
    """Says hello, in chunks or until the connection ends."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"5;note=x\r\nhello\r\n6\r\n world\r\n0\r\nTrailer: x\r\n\r\n")
        else:
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(BODY)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def plain_proxy() -> Iterator[FaultyProxy]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with FaultyProxy("127.0.0.1", server.server_port) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("framing", ["chunked", "until-the-end"])
def test_other_framings_of_an_answer(plain_proxy, framing):
    address = f"{plain_proxy.endpoint}/{framing}"
    assert raw(plain_proxy, "GET", address) == (200, BODY)
    plain_proxy.faults = {"wrong_xml": 1}
    assert different_bytes(raw(plain_proxy, "GET", address)[1], BODY) == 1
    assert plain_proxy.counts == {"wrong_xml": 1}
    if framing == "chunked":
        plain_proxy.faults = {"truncated": 1}
        with pytest.raises(http.client.IncompleteRead):
            raw(plain_proxy, "GET", address)
