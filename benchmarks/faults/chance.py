"""Which faults there are, and chance, which says what the next request gets."""

import random
import threading
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

FAULTS: Mapping[str, str] = MappingProxyType(
    {
        "error_500": "the answer is InternalError; the server sees nothing",
        "slow_down_503": "the answer is SlowDown; the server sees nothing",
        "reset_before": "the connection is reset; the server sees nothing",
        "reset_after": "the server does it, then the connection is reset without an answer",
        "stall": "the answer pauses, before it or in the middle of its body",
        "truncated": "the answer's body ends early and the connection closes",
        "wrong_response": "one byte of an object is different where it is read",
        "wrong_xml": "one byte of another answer's XML is different: a list's, an error's",
        "wrong_request": "one byte of the request's body is different",
    }
)


class Draw(NamedTuple):
    """What chance has for one request."""

    fault: str  # empty: none
    place: float  # where in a body, as a share of its length
    in_body: bool  # where a stall is: in the answer's body, if it has one, or before the answer


class Chance:
    """Draws and counts for all connections of a proxy."""

    def __init__(self, faults: Mapping[str, float], seed: int, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self.faults = faults
        self._random = random.Random(seed)  # noqa: S311 - faults are drawn, not secrets
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._requests = 0
        self._stopping = threading.Event()

    @property
    def faults(self) -> Mapping[str, float]:
        """The probability of each fault."""
        return self._faults

    @faults.setter
    def faults(self, faults: Mapping[str, float]) -> None:
        unknown = sorted(set(faults) - set(FAULTS))
        if unknown:
            raise ValueError(f"no such fault: {', '.join(unknown)}; there are {', '.join(FAULTS)}")
        if min(faults.values(), default=0.0) < 0 or sum(faults.values()) > 1 + 1e-9:
            raise ValueError("the probabilities have to be 0 or more, and together at most 1")
        self._faults = MappingProxyType(dict(faults))

    @property
    def counts(self) -> Counter[str]:
        """How often each fault was injected so far; a copy."""
        with self._lock:
            return Counter(self._counts)

    @property
    def requests(self) -> int:
        """How many requests came so far."""
        with self._lock:
            return self._requests

    def draw(self) -> Draw:
        """Chance for the next request."""
        with self._lock:
            self._requests += 1
            # Always three, so that the faults asked for do not shift what later requests get.
            chance, place, half = (self._random.random() for _ in range(3))
        for fault, probability in self.faults.items():
            if chance < probability:
                return Draw(fault, place, half < 0.5)
            chance -= probability
        return Draw("", place, half < 0.5)

    def count(self, fault: str) -> None:
        """Count a fault; before the client can notice it, so that it finds the count right.

        Args:
            fault: its name.
        """
        with self._lock:
            self._counts[fault] += 1

    def stall(self) -> None:
        """Count a stall and wait for as long as it lasts, or until the proxy ends."""
        self.count("stall")
        self._stopping.wait(self.stall_seconds)

    def end_stalls(self) -> None:
        """End all stalls, also those to come."""
        self._stopping.set()
