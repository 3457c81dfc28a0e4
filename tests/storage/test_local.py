"""The local backend: what a store needs of its place, with real files and real processes."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from storage.errors import StoreError, StoreUnwritable
from storage.local import LocalBackend


@pytest.fixture
def backend(tmp_path):
    return LocalBackend(tmp_path / "store")


def test_what_was_put_is_read_and_listed(backend):
    backend.put("a/b.txt", b"one")
    backend.put("a/b.txt", b"two")
    assert backend.read("a/b.txt") == b"two"
    assert [(entry.key, entry.size) for entry in backend.list("a/")] == [("a/b.txt", 3)]
    assert list(backend.list("nothing/")) == []


def test_list_takes_any_prefix_and_sorts(backend):
    for key in ("x/2", "x/10", "x/1/y", "xy/1"):
        backend.put(key, b"")
    assert [entry.key for entry in backend.list("x/1")] == ["x/1/y", "x/10"]
    assert [entry.key for entry in backend.list("")] == ["x/1/y", "x/10", "x/2", "xy/1"]


def test_create_writes_once(backend):
    assert backend.create("m.json", b"first")
    assert not backend.create("m.json", b"second")
    assert backend.read("m.json") == b"first"


def test_create_has_one_winner_among_threads(backend):
    won = []
    gate = threading.Barrier(8)

    def race(number):
        gate.wait()
        if backend.create("m.json", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert backend.read("m.json") == str(won[0]).encode()


def test_replace_needs_the_tag_of_what_is_there(backend):
    assert not backend.replace("r", b"x", "nothing-there")
    assert backend.replace("r", b"1", None)
    assert not backend.replace("r", b"2", None)
    data, tag = backend.read_with_etag("r")
    assert data == b"1"
    assert backend.replace("r", b"2", tag)
    assert not backend.replace("r", b"3", tag)
    assert backend.read("r") == b"2"


def test_no_update_is_lost_between_processes(backend, tmp_path):
    """Four processes add 1 twenty-five times each by compare and swap."""
    code = f"""
from pathlib import Path
from storage.local import LocalBackend
backend = LocalBackend(Path({str(tmp_path / "store")!r}))
for _ in range(25):
    while True:
        found = backend.read_with_etag("n")
        value = int(found[0]) + 1 if found else 1
        if backend.replace("n", str(value).encode(), found and found[1]):
            break
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
        for _ in range(4)
    ]
    assert [process.wait() for process in running] == [0] * 4
    assert backend.read("n") == b"100"


def test_put_file_copies(backend, tmp_path):
    source = tmp_path / "weights"
    source.write_bytes(b"as trained")
    backend.put_file("policy/weights", source)
    with source.open("r+b") as stream:
        stream.write(b"XX")
    assert backend.read("policy/weights") == b"as trained"


def test_delete_is_content_with_nothing(backend):
    backend.delete("absent")
    backend.put("k", b"")
    backend.delete("k")
    with pytest.raises(KeyError):
        backend.read("k")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "a\0b"]
)
def test_keys_that_leave_the_store_are_refused_before_any_io(backend, key):
    for operation in (
        lambda: backend.read(key), lambda: backend.put(key, b""), lambda: backend.delete(key),
        lambda: backend.create(key, b""), lambda: backend.replace(key, b"", None),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="not a name in a store"):
            operation()
    assert not backend.root.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    backend = LocalBackend(tmp_path / "file" / "store")
    with pytest.raises(StoreUnwritable, match=r"file/store' cannot be written.*FPO_STORE"):
        backend.put("k", b"")


def test_a_folder_without_permission_is_named():
    """As root, who may write everywhere, under the rights of nobody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o555)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(StoreUnwritable, match=r"cannot be written \(Permission denied\)"):
                LocalBackend(folder).put("k", b"")
        finally:
            os.seteuid(me)
        assert list(folder.iterdir()) == []


def test_a_full_disk_is_said_as_such(backend, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnwritable, match="no space left for the store"):
        backend.put("k", b"data")
    assert list(backend.list("")) == []  # the temporary file is gone too
    assert [path for path in backend.root.rglob("*") if path.is_file()] == []
