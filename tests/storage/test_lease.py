"""Leases: how long silence is taken for life, and that a cut-off holder stops writing."""

import json
import os
import subprocess
import sys
import time

import pytest

from storage import lease as leases
from storage import processes
from storage.errors import HoldLost, StoreError
from storage.lease import Lease
from storage.local import LocalBackend
from storage.processes import is_gone, this_process


@pytest.fixture
def backend(tmp_path):
    """A folder has the same conditional writes as S3, and is quicker."""
    return LocalBackend(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when told to; waiting makes it pass."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(leases, "_now", lambda: Clock.now)

    def sleep(seconds):
        Clock.now += seconds

    monkeypatch.setattr(leases.time, "sleep", sleep)
    return Clock


def of_another_machine(backend, count: int = 1) -> None:
    value = {"holder": "other", "process": "other-boot pid:[1] 5:6", "count": count}
    backend.put("l", json.dumps(value).encode())


def test_a_silent_holder_of_another_machine_is_followed_after_a_minute(backend, clock):
    of_another_machine(backend)
    waiting = Lease(backend, "l")
    assert waiting.acquire(lambda: None)
    assert 60 <= clock.now - 1000 < 70
    waiting.release()
    assert backend.read_with_etag("l") is None


def test_a_holder_that_renews_is_waited_for(backend, clock, monkeypatch):
    of_another_machine(backend)
    renewals = []

    def sleep(seconds):
        clock.now += seconds
        if len(renewals) < 30 and clock.now % 10 < 1:
            renewals.append(clock.now)
            of_another_machine(backend, count=len(renewals))

    monkeypatch.setattr(leases.time, "sleep", sleep)
    waiting = Lease(backend, "l")
    assert waiting.acquire(lambda: None)
    assert clock.now - renewals[-1] >= 60
    assert len(renewals) == 30
    waiting.release()


def test_a_holder_whose_lease_was_taken_writes_nothing_more(backend, clock):
    held = Lease(backend, "l")
    assert held.acquire(None)
    held.check()
    of_another_machine(backend)
    held.check()  # it renewed a moment ago, nobody can have taken it rightly
    clock.now += 41
    with pytest.raises(HoldLost, match="another one took over"):
        held.check()
    held.release()
    assert backend.read_with_etag("l") is not None  # the other's stays


def test_a_holder_that_was_away_and_nobody_came_goes_on(backend, clock):
    held = Lease(backend, "l")
    assert held.acquire(None)
    clock.now += 500
    held.check()
    held.release()


def test_a_store_that_is_away_is_no_loss_of_the_lease(backend, clock, monkeypatch):
    held = Lease(backend, "l")
    assert held.acquire(None)

    def away(_key):
        raise StoreError("cannot be reached")

    clock.now += 50
    with monkeypatch.context() as patched:
        patched.setattr(backend, "read_with_etag", away)
        with pytest.raises(StoreError, match="cannot be reached"):
            held.check()
        held.release()  # no error on the way out
    assert Lease(backend, "l").acquire(None) is False


def test_a_lease_that_a_dead_machine_left_is_seen_by_its_age_without_waiting(backend, tmp_path):
    of_another_machine(backend)
    assert Lease(backend, "l").acquire(None) is False
    os.utime(tmp_path / "l", (time.time() - 1000,) * 2)
    taken = Lease(backend, "l")
    assert taken.acquire(None)
    taken.release()


def test_a_living_process_that_is_hidden_from_us_is_not_gone(monkeypatch):
    """Another user's, where /proc shows only one's own: it cannot be looked at, but signalled."""
    me = this_process()
    assert me is not None
    mine = processes._identity
    monkeypatch.setattr(
        processes, "_identity", lambda pid: mine(pid) if pid == os.getpid() else None
    )
    place = me.rpartition(" ")[0]
    assert not is_gone(f"{place} 1:1")


def test_a_process_that_ended_and_was_not_waited_for_is_gone():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = processes._identity(process.pid)
    assert not is_gone(identity)
    process.kill()
    deadline = time.monotonic() + 10
    while not is_gone(identity):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.wait()


def test_processes_are_told_apart():
    me = this_process()
    assert me is not None
    assert not is_gone(me)
    place, _, process = me.rpartition(" ")
    pid, _, started = process.partition(":")
    assert is_gone(f"{place} {pid}:{int(started) + 1}")  # the number was used again
    assert is_gone(f"{place} {2**22 + 1}:{started}")
    assert not is_gone(f"another-boot pid:[1] {process}")
    assert not is_gone(None)
