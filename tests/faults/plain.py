"""A client that shows every byte."""

import http.client
from typing import Any

from benchmarks.faults.proxy import FaultyProxy


def raw(proxy: FaultyProxy, method: str, address: str, **how: Any) -> tuple[int, bytes]:
    """Status and body of what a request by way of the proxy is answered with."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    connection.request(method, "/" + address.split("/", 3)[3], **how)
    with connection.getresponse() as response:
        answer = response.status, response.read()
    connection.close()
    return answer


def different_bytes(left: bytes, right: bytes) -> int:
    assert len(left) == len(right)
    return sum(a != b for a, b in zip(left, right, strict=True))
