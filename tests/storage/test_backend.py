"""What a store needs of its place, the same on a folder and on S3."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from storage.backend import FileRecord
from storage.errors import FileDamaged, StoreError

ROOT = Path(__file__).parents[2]


def record_of(data: bytes) -> FileRecord:
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def put(backend, tmp_path, key: str, data: bytes) -> FileRecord:
    source = tmp_path / "source"
    source.write_bytes(data)
    return backend.put_file(key, source)


def test_what_was_put_is_read_and_listed(backend):
    backend.put("a/b.txt", b"one")
    backend.put("a/b.txt", b"two")
    assert backend.read("a/b.txt") == b"two"
    (entry,) = backend.list("a/")
    assert (entry.key, entry.size) == ("a/b.txt", 3)
    assert abs(entry.modified - time.time()) < 60
    assert list(backend.list("nothing/")) == []


def test_list_takes_any_prefix_and_sorts(backend):
    for key in ("x/2", "x/10", "x/1/y", "xy/1"):
        backend.put(key, b"")
    assert [entry.key for entry in backend.list("x/1")] == ["x/1/y", "x/10"]
    assert [entry.key for entry in backend.list("")] == ["x/1/y", "x/10", "x/2", "xy/1"]


def test_list_has_no_page_limit(backend):
    names = [f"many/{number:04d}" for number in range(1100)]
    for name in names:
        backend.put(name, b"")
    assert [entry.key for entry in backend.list("many/")] == names
    backend.delete(names)
    assert list(backend.list("many/")) == []


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
    assert not backend.replace("r", b"x", '"nothing-there"')
    assert backend.replace("r", b"1", None)
    assert not backend.replace("r", b"2", None)
    data, tag = backend.read_with_etag("r")
    assert data == b"1"
    assert backend.replace("r", b"2", tag)
    assert not backend.replace("r", b"3", tag)
    assert backend.read("r") == b"2"


def test_no_update_is_lost_between_processes(backend, place):
    """Four processes add 1 ten times each by compare and swap."""
    code = f"""
from storage.location import open_store
backend = open_store({place.url!r}).backend
for _ in range(10):
    while True:
        found = backend.read_with_etag("n")
        value = int(found[0]) + 1 if found else 1
        if backend.replace("n", str(value).encode(), found and found[1]):
            break
"""
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert backend.read("n") == b"40"


def test_put_file_moves_and_tells_what_it_stored(backend, place, tmp_path):
    assert put(backend, tmp_path, "policy/weights", b"as trained") == record_of(b"as trained")
    assert not (tmp_path / "source").exists()
    assert place.read("policy/weights") == b"as trained"


def test_a_large_file_goes_in_parts_and_comes_back(backend, tmp_path):
    data = os.urandom(40 << 20)
    sent, received = [], []
    source = tmp_path / "source"
    source.write_bytes(data)
    record = backend.put_file("big", source, sent.append)
    path = backend.fetch("big", record, received.append)
    assert path.read_bytes() == data
    assert sum(sent) == sum(received) == len(data)
    assert backend.damage("big", record) is None


def test_fetch_names_what_is_wrong(backend, place, tmp_path):
    record = put(backend, tmp_path, "d/file", b"0123456789")
    for content, reason in (
        (b"01234567", "it has 8 bytes, written were 10"),
        (b"0123456X89", "its sha256 is "),
    ):
        place.write("d/file", content)
        for read in (backend.fetch, lambda key, r: backend.copy_to(key, r, tmp_path / "copy")):
            with pytest.raises(FileDamaged, match=reason):
                read("d/file", record)
        assert reason in backend.damage("d/file", record)
    place.remove("d/file")
    with pytest.raises(FileDamaged, match="it is missing"):
        backend.fetch("d/file", record)
    assert backend.damage("d/file", record) == "it is missing"


def test_intact_needs_the_file(backend, place, tmp_path):
    whole = put(backend, tmp_path, "d/whole", b"content")
    cut = put(backend, tmp_path, "d/cut", b"content")
    place.write("d/cut", b"cont")
    gone = record_of(b"never")
    assert backend.intact({"d/whole": whole, "d/cut": cut, "d/gone": gone}) == {"d/whole"}


def test_a_folder_of_files_has_their_names(backend, tmp_path):
    files = {}
    for name in ("config.json", "tokenizer/vocab.txt"):
        record = put(backend, tmp_path, f"p/model/{name}", name.encode())
        files[name] = backend.fetch(f"p/model/{name}", record)
    folder = backend.folder("p/model", files)
    assert (folder / "config.json").read_text() == "config.json"
    assert (folder / "tokenizer" / "vocab.txt").read_text() == "tokenizer/vocab.txt"


def test_what_is_here_needs_no_fetching(backend, place, tmp_path):
    """A folder's files always are; an object once it was fetched."""
    record = put(backend, tmp_path, "p/sae/weights", b"many bytes")
    assert backend.is_here("p/sae/weights", record) == (not place.url.startswith("s3:"))
    backend.fetch("p/sae/weights", record)
    assert backend.is_here("p/sae/weights", record)
    assert not backend.is_here("p/sae/gone", record_of(b"never"))


def test_delete_is_content_with_nothing(backend):
    backend.delete(["absent"])
    backend.put("k", b"")
    backend.delete(["k"])
    with pytest.raises(KeyError):
        backend.read("k")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", "a\0b"]
)
def test_keys_that_leave_the_store_are_refused_before_any_io(backend, place, tmp_path, key):
    (tmp_path / "file").write_bytes(b"x")
    record = record_of(b"x")
    for operation in (
        lambda: backend.read(key), lambda: backend.put(key, b""), lambda: backend.delete([key]),
        lambda: backend.create(key, b""), lambda: backend.replace(key, b"", None),
        lambda: backend.put_file(key, tmp_path / "file"), lambda: backend.fetch(key, record),
        lambda: backend.hold(key, None).__enter__(),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="not a name in a store"):
            operation()
    assert place.keys() == []
    assert (tmp_path / "file").exists()


# ---- holding: one writer at a time


def test_a_hold_is_exclusive_and_is_given_back(backend, place):
    other = place.open().backend
    with backend.hold("a/1", None) as first:
        assert first is not None
        first.check()
        with other.hold("a/1", None) as second, other.hold("a/2", None) as beside:
            assert second is None
            assert beside is not None
    with other.hold("a/1", None) as second:
        assert second is not None


def test_who_waits_is_told_and_gets_it(backend, place):
    told = threading.Event()
    order = []

    def wait_for_it():
        with place.open().backend.hold("a", told.set):
            order.append("second")

    with backend.hold("a", None):
        thread = threading.Thread(target=wait_for_it)
        thread.start()
        assert told.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


def test_a_killed_holder_is_followed_at_once(backend, place):
    code = f"""
import time
from storage.location import open_store
with open_store({place.url!r}).backend.hold("a", None) as hold:
    assert hold
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with backend.hold("a", None) as hold:
        assert hold is None
    process.kill()
    process.wait()
    started = time.monotonic()
    with backend.hold("a", lambda: None) as hold:
        assert hold is not None
    assert time.monotonic() - started < 50  # and not the minute that a live one may be silent


def test_many_processes_never_hold_together(backend, place):
    """Each appends begin and end to one object while it holds; they never interleave."""
    code = f"""
import os
from storage.location import open_store
backend = open_store({place.url!r}).backend
for _ in range(3):
    with backend.hold("a", lambda: None) as hold:
        for word in ("begin", "end"):
            try:
                before = backend.read("log")
            except KeyError:
                before = b""
            backend.put("log", before + f"{{word}} {{os.getpid()}}\\n".encode())
"""
    running = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in running] == [0] * 3
    lines = backend.read("log").decode().splitlines()
    assert len(lines) == 18
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert begin.split()[0] == "begin"
        assert end == begin.replace("begin", "end")
