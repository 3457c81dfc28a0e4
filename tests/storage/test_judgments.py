"""The judgments of a store, on a folder and on S3."""

import threading

import pytest

from storage.judgments import Judgments
from storage.local import LocalBackend

DIGESTS = [f"{number:02x}" * 32 for number in range(40)]


@pytest.fixture
def judgments(backend):
    return Judgments(backend)


def test_what_was_put_is_found_where_the_docs_say(judgments, place):
    assert judgments.put(DIGESTS[10], b"one") == b"one"
    assert place.read(f"judgments/0a/{DIGESTS[10]}.json") == b"one"
    assert judgments.get_all(DIGESTS) == {DIGESTS[10]: b"one"}


def test_what_is_there_stays(judgments):
    judgments.put(DIGESTS[0], b"first")
    assert judgments.put(DIGESTS[0], b"second") == b"first"
    assert judgments.get_all(DIGESTS[:1]) == {DIGESTS[0]: b"first"}


def test_a_damaged_one_is_written_over(judgments, place):
    judgments.put(DIGESTS[0], b"first")
    place.write(f"judgments/00/{DIGESTS[0]}.json", b"fi")
    judgments.mend(DIGESTS[0], b"second")
    assert judgments.get_all(DIGESTS[:1]) == {DIGESTS[0]: b"second"}


def test_many_writers_at_a_time_agree_on_the_first(judgments):
    """As the judge's client writes: from several threads, here each all of them."""
    given = {}

    def write(name: str) -> None:
        given[name] = [judgments.put(digest, f"{name} {digest}".encode()) for digest in DIGESTS]

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert given["a"] == given["b"] == given["c"] == given["d"]
    assert judgments.get_all(DIGESTS) == dict(zip(DIGESTS, given["a"], strict=True))


def test_cleaning_up_and_listing_leave_them_alone(judgments, store, place):
    from storage.catalog import list_artifacts
    from storage.gc import find_garbage

    judgments.put(DIGESTS[0], b"one")
    assert list_artifacts(store) == []
    assert find_garbage(store, grace_hours=0).artifacts == ()
    assert place.keys() == [f"judgments/00/{DIGESTS[0]}.json"]


def test_a_copy_takes_what_the_other_store_has_not(judgments, tmp_path):
    other = Judgments(LocalBackend(tmp_path / "other"))
    judgments.put(DIGESTS[0], b"here")
    judgments.put(DIGESTS[1], b"both, from here")
    other.put(DIGESTS[1], b"both, from there")
    assert judgments.copy_to(other) == 1
    assert other.get_all(DIGESTS) == {DIGESTS[0]: b"here", DIGESTS[1]: b"both, from there"}
    assert judgments.copy_to(other) == 0
