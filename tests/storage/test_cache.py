"""The read cache: verified, within its limit, safe between processes."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.backend import FileRecord
from storage.cache import ReadCache, cache_limit
from storage.errors import StoreError, StoreUnwritable

ROOT = Path(__file__).parents[2]


def record_of(data: bytes) -> FileRecord:
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


class Source:
    """Counts downloads."""

    def __init__(self, cache: ReadCache) -> None:
        self.cache, self.downloads = cache, 0

    def get(self, data: bytes) -> Path:
        def download(path: Path) -> None:
            self.downloads += 1
            path.write_bytes(data)

        return self.cache.get(record_of(data), download)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def in_another_process(folder: Path, limit: int, contents: list[bytes], then: str = "") -> str:
    """Get files in a process of its own and end it; what it prints."""
    code = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from storage.cache import ReadCache
from tests.storage.test_cache import Source
source = Source(ReadCache(Path({str(folder)!r}), {limit}))
paths = [source.get(data) for data in {contents!r}]
print(source.downloads, sum(path.exists() for path in paths), flush=True)
{then}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("files/??/*"))


def test_a_file_is_downloaded_once_for_all_processes(folder):
    assert in_another_process(folder, 1000, [b"one", b"two", b"one"]) == "2 3"
    source = Source(ReadCache(folder, 1000))
    assert source.get(b"one").read_bytes() == b"one"
    assert source.downloads == 0


def test_the_least_recently_used_goes_first(folder):
    contents = [bytes([n]) * 100 for n in range(4)]
    in_another_process(folder, 1000, contents)
    times = {
        record_of(data).sha256: 1000.0 * n for n, data in enumerate([*contents[1:], contents[0]])
    }
    for path in folder.glob("files/??/*"):
        os.utime(path, (times[path.name],) * 2)
    source = Source(ReadCache(folder, 350))
    source.get(b"n" * 100)
    left = {path.name for path in folder.glob("files/??/*")}
    assert left == {record_of(data).sha256 for data in (contents[3], contents[0], b"n" * 100)}


def test_what_a_living_process_uses_stays_and_what_a_dead_one_used_goes(folder):
    source = Source(ReadCache(folder, 250))
    mine = [source.get(bytes([n]) * 100) for n in range(2)]
    # Another process wants more than there is room for: its own and mine stay.
    assert in_another_process(folder, 250, [b"a" * 100, b"b" * 100]) == "2 2"
    assert all(path.exists() for path in mine)
    source.get(b"c" * 100)
    assert stored(folder) <= 400  # the other is gone, and what it used


def test_a_killed_process_leaves_no_pin_and_no_half_file(folder):
    code = f"""
import os, sys, signal
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from storage.cache import ReadCache
from tests.storage.test_cache import Source, record_of
cache = ReadCache(Path({str(folder)!r}), 250)
Source(cache).get(b"a" * 100)
cache.view("model", {{"w": cache._object(record_of(b"a" * 100).sha256)}})
def half(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
cache.get(record_of(b"b" * 100), half)
"""
    subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT)
    assert list(folder.glob("incoming/*"))
    assert list(folder.glob("pins/*"))
    source = Source(ReadCache(folder, 250))
    for content in (b"b", b"c", b"d"):
        source.get(content * 100)
    assert source.downloads == 3
    assert list(folder.glob("incoming/*")) == []
    assert list(folder.glob("views/*")) == []
    assert [path.name for path in folder.glob("pins/*")] == [source.cache._id]


def test_a_damaged_file_in_the_cache_is_brought_again(folder):
    in_another_process(folder, 1000, [b"content"])
    (path,) = folder.glob("files/??/*")
    path.write_bytes(b"contenX")
    source = Source(ReadCache(folder, 1000))
    assert source.get(b"content").read_bytes() == b"content"
    assert source.downloads == 1


def test_a_download_that_fails_leaves_nothing(folder):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise StoreError("the network went away")

    cache = ReadCache(folder, 1000)
    with pytest.raises(StoreError, match="went away"):
        cache.get(record_of(b"x"), fail)
    assert list(folder.glob("incoming/*")) == []
    assert stored(folder) == 0


def test_many_processes_at_once_under_a_small_limit(folder):
    """Six processes read forty files each, in other orders, with room for five; all are right."""
    code = """
import random, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from storage.cache import ReadCache
from tests.storage.test_cache import Source
numbers = list(range(40))
random.Random({seed}).shuffle(numbers)
for number in numbers:  # a cache object for each, so that few files are in use at a time
    data = str(number).encode() * 100
    source = Source(ReadCache(Path({folder!r}), 1000))
    assert source.get(data).read_bytes() == data
"""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(root=str(ROOT), seed=seed, folder=str(folder))],
            cwd=ROOT,
        )
        for seed in range(6)
    ]
    assert [process.wait() for process in running] == [0] * 6
    Source(ReadCache(folder, 1000)).get(b"last")
    assert stored(folder) <= 1000


def test_the_threads_of_a_process_share_a_cache(folder):
    """All at once from the first use on, as an artifact's files are read."""
    for number in range(20):
        source = Source(ReadCache(folder, 1000))
        with ThreadPoolExecutor(8) as pool:
            contents = [f"{number} {n}".encode() for n in range(16)]
            assert [path.read_bytes() for path in pool.map(source.get, contents)] == contents


def test_a_full_disk_names_the_cache(small_disk):
    cache = ReadCache(small_disk / "cache", 10**9)
    with pytest.raises(StoreUnwritable, match="no space left for the read cache .*FPO_CACHE"):
        cache.get(record_of(b"x"), lambda path: path.write_bytes(bytes(4 << 20)))
    assert list((small_disk / "cache").glob("incoming/*")) == []


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200 * 10**9), ("1.5 tb", 1.5 * 10**12), ("1000", 1000)]
)
def test_the_limit_is_written_as_people_write_sizes(monkeypatch, text, size):
    monkeypatch.setenv("FPO_CACHE_SIZE", text)
    assert cache_limit() == size


def test_a_limit_that_is_no_size_is_refused(monkeypatch):
    monkeypatch.setenv("FPO_CACHE_SIZE", "much")
    with pytest.raises(StoreError, match="is not a size; write it as 200GB"):
        cache_limit()
