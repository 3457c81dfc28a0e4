"""The object store, a proxy before it, and a client that never retries and so sees each fault."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.faults.proxy import FaultyProxy

STALL_SECONDS = 1.0


@pytest.fixture
def proxy(seaweed) -> Iterator[FaultyProxy]:
    """A proxy without faults; a test assigns those that it is about."""
    with FaultyProxy("127.0.0.1", seaweed.port, stall_seconds=STALL_SECONDS) as proxy:
        yield proxy


@pytest.fixture
def connect(seaweed) -> Callable[..., Any]:
    """Makes a client without retries for a proxy."""

    def make(proxy: FaultyProxy, **config: Any) -> Any:
        return seaweed.client_at(proxy.endpoint, **{"retries": {"total_max_attempts": 1}, **config})

    return make


@pytest.fixture
def client(connect, proxy) -> Any:
    """A client without retries, by way of the proxy."""
    return connect(proxy)


@pytest.fixture
def direct(seaweed) -> Any:
    """A client that sees what is really there."""
    return seaweed.client()
