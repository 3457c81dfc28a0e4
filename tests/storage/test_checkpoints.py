"""Saved work of an artifact in the making: whole or not there, newest first, gone at the end."""

from typing import Any

import pytest

from storage.checkpoints import SAVED_FILE
from storage.errors import StoreError
from storage.manifest import Made


def written(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


@pytest.fixture
def writer(store):
    with store.hold("policy", "0" * 16, None) as hold:
        yield store.writer("policy", "0" * 16, hold)


def save(writer, tmp_path, name, text="state"):
    files = [written(tmp_path / name, part, f"{text} {part}") for part in ("a.bin", "b.bin")]
    writer.checkpoints().put(name, files)
    return files


def test_the_newest_comes_back_and_the_older_ones_go(writer, tmp_path, store):
    assert writer.checkpoints().newest() is None
    for number in (1, 2, 10):
        files = save(writer, tmp_path, f"step-{number:04d}", f"state {number}")
        assert not any(path.exists() for path in files)
    assert store.state("policy", "0" * 16) == "partial"
    saved = writer.checkpoints().newest()
    assert saved.name == "step-0010"
    assert (saved.folder / "b.bin").read_text() == "state 10 b.bin"
    writer.checkpoints().keep(2)
    assert writer.checkpoints().names() == ["step-0002", "step-0010"]
    save(writer, tmp_path, "step-0010", "other")  # is there already, and stays
    assert (writer.checkpoints().newest().folder / "a.bin").read_text() == "state 10 a.bin"


def test_one_that_was_cut_short_or_damaged_is_passed_over(writer, tmp_path, store, caplog):
    save(writer, tmp_path, "step-0001")
    save(writer, tmp_path, "step-0002")
    key = f"artifacts/policy/{'0' * 16}/checkpoints"
    store.backend.put(f"{key}/step-0002/a.bin", b"state")
    store.backend.put(f"{key}/step-0003/a.bin", b"no record yet")
    saved = writer.checkpoints().newest()
    assert saved.name == "step-0001"
    assert "checkpoint step-0002 is damaged" in caplog.text
    store.backend.put(f"{key}/step-0001/{SAVED_FILE}", b"{}")
    store.backend.delete([f"{key}/step-0002/{SAVED_FILE}"])
    assert writer.checkpoints().newest() is None


def test_one_that_the_store_cannot_take_stays_where_it_is(writer, tmp_path, store, monkeypatch):
    """The second file fails: the first has arrived, and is still here too for another try."""
    taken = store.backend.put_file

    def put_file(key: str, *more: Any, **settings: Any):
        if "b.bin" in key:
            raise StoreError("away")
        return taken(key, *more, **settings)

    monkeypatch.setattr(store.backend, "put_file", put_file)
    with pytest.raises(StoreError, match="away"):
        save(writer, tmp_path, "step-0001")
    assert writer.checkpoints().newest() is None
    assert sorted(path.name for path in (tmp_path / "step-0001").iterdir()) == ["a.bin", "b.bin"]
    monkeypatch.undo()
    save(writer, tmp_path, "step-0001")
    assert writer.checkpoints().newest().name == "step-0001"


def test_they_go_when_the_artifact_is_whole(writer, tmp_path, store):
    save(writer, tmp_path, "step-0001")
    writer.put_bytes("model.bin", b"weights")
    writer.commit(Made(1, {}, {}, {}, 0.0, {}))
    assert writer.checkpoints().names() == []
    assert store.state("policy", "0" * 16) == "complete"
    keys = [entry.key for entry in store.backend.list("artifacts/")]
    assert sorted(key.rpartition("/")[2] for key in keys) == ["manifest.json", "model.bin"]
