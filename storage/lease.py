"""The only right to write something on a store that has no locks: an object that is kept alive.

The holder changes the object every few seconds. Another run that sees it unchanged for a minute
(by its own clock: no two clocks are compared) takes it over by compare and swap, and at once where
it can see that the holder's process is gone. A holder that could not renew for most of that minute
does not write any more, so a paused or cut-off run cannot write over its successor's work.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from storage.backend import Entry
from storage.errors import HoldLost, StoreError
from storage.processes import is_gone, this_process

RENEW_SECONDS, STALE_SECONDS, POLL_SECONDS = 10.0, 60.0, 1.0
ABANDONED_SECONDS, RELEASE_SECONDS = 900.0, 5.0
_SAFE_SECONDS = STALE_SECONDS * 2 / 3


class ConditionalStore(Protocol):
    """The part of a backend that a lease is made of."""

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """See Backend."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """See Backend."""
        ...

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """See Backend."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """See Backend."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Backend."""
        ...


@contextmanager
def lease(
    store: ConditionalStore, key: str, on_wait: Callable[[], None] | None
) -> Iterator["Lease | None"]:
    """Hold a lease while the context is open; see ``Backend.hold``."""
    held = Lease(store, key)
    if not held.acquire(on_wait):
        yield None
        return
    try:
        yield held
    finally:
        held.release()


class Lease:
    """One attempt to hold a key.

    Args:
        store: where the lease object is.
        key: its key.
    """

    def __init__(self, store: ConditionalStore, key: str) -> None:
        self._store, self._key = store, key
        self._holder = uuid.uuid4().hex
        self._count = 0
        self._renewed = -float("inf")
        self._lost = False
        self._released = threading.Event()
        self._renewing = threading.Lock()

    def _is_old(self) -> bool:
        """Whether a holder has not renewed for so long that no clock's error explains it."""
        entry = next(iter(self._store.list(self._key)), None)
        return entry is not None and time.time() - entry.modified > ABANDONED_SECONDS

    def acquire(self, on_wait: Callable[[], None] | None) -> bool:
        """Take the lease; waits for another holder, or returns False where ``on_wait`` is None."""
        watched = _Watched()
        while not self._take(watched):
            if on_wait is None:
                # No time to watch it; one that a dead machine left is seen by its age.
                if not (self._is_old() and self._take(watched, whatever_it_is=True)):
                    return False
                break
            if not watched.told:
                on_wait()
                watched.told = True
            time.sleep(POLL_SECONDS)
        threading.Thread(target=self._keep, daemon=True, name="fpo-lease").start()
        return True

    def _take(self, watched: "_Watched", *, whatever_it_is: bool = False) -> bool:
        started = _now()
        data = self._data()
        taken = self._store.create(self._key, data)
        if not taken:
            found = self._store.read_with_etag(self._key)
            # Where it is gone by now, the next round creates it.
            if found and (whatever_it_is or watched.is_stale(*found)):
                taken = self._store.replace(self._key, data, found[1])
        if taken:
            self._renewed = started
        return taken

    def _data(self) -> bytes:
        self._count += 1
        value = {"holder": self._holder, "process": this_process(), "count": self._count}
        return (json.dumps(value) + "\n").encode()

    def _keep(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            try:
                self._renew()
            except StoreError:
                continue  # the store is away: check() tells whether that was for too long

    def _renew(self) -> None:
        with self._renewing:
            if self._released.is_set() or self._lost:
                return
            started = _now()
            found = self._store.read_with_etag(self._key)
            ours = found is not None and _value(found[0]).get("holder") == self._holder
            if found and ours and self._store.replace(self._key, self._data(), found[1]):
                self._renewed = started
            else:
                self._lost = True

    def check(self) -> None:
        """See Hold.

        Raises:
            HoldLost: another run has it, or may have.
            StoreError: the store cannot be reached to find out.
        """
        if not self._lost and _now() - self._renewed > _SAFE_SECONDS:
            self._renew()
        if self._lost:
            raise HoldLost(
                "this run could not reach the store for so long that another one took over its "
                "work; run the same command again, it reuses what the other makes"
            )

    def release(self) -> None:
        """Give it back, if it is still ours."""
        self._released.set()
        # A renewal that waits for a store that is away would keep Ctrl-C waiting with it.
        if not self._renewing.acquire(timeout=RELEASE_SECONDS):
            return  # it goes stale by itself
        try:
            found = self._store.read_with_etag(self._key)
            if found and _value(found[0]).get("holder") == self._holder:
                self._store.delete([self._key])
        except StoreError:
            return
        finally:
            self._renewing.release()


class _Watched:
    """What a waiting run has seen of another's lease."""

    def __init__(self) -> None:
        self.told = False
        self._etag: str | None = None
        self._since = 0.0

    def is_stale(self, data: bytes, etag: str) -> bool:
        if is_gone(_value(data).get("process")):
            return True
        if etag != self._etag:
            self._etag, self._since = etag, _now()
        return _now() - self._since > STALE_SECONDS


def _value(data: bytes) -> dict:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _now() -> float:
    """Seconds that go on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)
