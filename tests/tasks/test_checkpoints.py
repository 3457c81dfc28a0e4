"""The keeper of training's checkpoints, on a store that fails for a while."""

import json
import threading
from typing import Any

import pytest

from fpo_core.errors import FPOError
from fpo_core.training.checkpoint import folder_name
from storage.errors import StoreError
from storage.location import open_store
from tasks.checkpoints import CheckpointKeeper

VERSION = "0" * 16


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


def written(keeper, step):
    """A checkpoint of one rank, as a worker leaves it."""
    folder = keeper.local / folder_name(step)
    folder.mkdir(parents=True)
    (folder / "state-00000-of-00001.safetensors").write_text(f"state {step}")
    for log in ("metrics.jsonl", "heldout.jsonl"):
        (folder / log).write_text("{}")
    meta = {"step": step, "ranks": 1, "version": VERSION, "made_from": {}}
    (folder / "checkpoint.json").write_text(json.dumps(meta))
    return folder


def settle(keeper):
    """Wait until what was begun is done."""
    keeper._thread.submit(int).result()


def break_store(store, monkeypatch, error):
    def put_file(*_: object, **__: object):
        raise error

    monkeypatch.setattr(store.backend, "put_file", put_file)


def test_the_newest_are_kept_and_the_local_ones_go(store):
    with store.hold("policy", VERSION, None) as hold:
        writer = store.writer("policy", VERSION, hold)
        with CheckpointKeeper(writer, 2) as keeper:
            for step in (1, 2, 3):
                keeper.keep(written(keeper, step))
                settle(keeper)
        assert writer.checkpoints().names() == [folder_name(2), folder_name(3)]
        assert list(keeper.local.iterdir()) == []
        assert keeper.newest().name == folder_name(3)


def test_one_that_is_lost_is_said_and_two_in_a_row_end_training(store, monkeypatch, caplog):
    with store.hold("policy", VERSION, None) as hold:
        writer = store.writer("policy", VERSION, hold)
        with CheckpointKeeper(writer, 2) as keeper, monkeypatch.context() as away:
            break_store(store, away, StoreError("the store is away"))
            for step in (1, 2):
                keeper.keep(written(keeper, step))
                settle(keeper)
            with pytest.raises(FPOError, match="2 checkpoints in a row could not be stored"):
                keeper.keep(written(keeper, 3))
        assert caplog.text.count("could not be stored: the store is away") == 2
        # All are still here: the next run stores them, and goes on from the newest.
        assert sorted(p.name for p in keeper.local.iterdir()) == [folder_name(n) for n in (1, 2, 3)]
        saved = CheckpointKeeper(writer, 2).newest()
        assert saved.name == folder_name(3)
        state = saved.folder / "state-00000-of-00001.safetensors"
        assert state.read_text() == "state 3"


def test_on_a_slow_store_the_newest_overtakes_those_that_wait(store, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    taken = store.backend.put_file

    def slow(key: str, *more: Any, **settings: Any):
        begun.set()
        assert go_on.wait(30)
        return taken(key, *more, **settings)

    monkeypatch.setattr(store.backend, "put_file", slow)
    with store.hold("policy", VERSION, None) as hold:
        writer = store.writer("policy", VERSION, hold)
        with CheckpointKeeper(writer, 5) as keeper:
            keeper.keep(written(keeper, 1))
            assert begun.wait(30)
            for step in (2, 3, 4):
                keeper.keep(written(keeper, step))
            go_on.set()
        assert writer.checkpoints().names() == [folder_name(1), folder_name(4)]
        assert list(keeper.local.iterdir()) == []


def test_what_is_no_fault_of_the_store_ends_training_as_itself(store, monkeypatch):
    with store.hold("policy", VERSION, None) as hold:
        keeper = CheckpointKeeper(store.writer("policy", VERSION, hold), 2)
        break_store(store, monkeypatch, ZeroDivisionError("ours"))
        with pytest.raises(ZeroDivisionError, match="ours"), keeper:
            keeper.keep(written(keeper, 1))
