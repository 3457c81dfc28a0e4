"""Artifacts: committed whole or not at all, resumed by receipt, verified when read."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storage.backend import FileRecord
from storage.catalog import find_artifact, list_artifacts
from storage.errors import ArtifactCorrupt, ArtifactMissing, HoldLost, OtherFormat, StoreError
from storage.gc import find_garbage
from storage.location import open_store
from storage.manifest import read_manifest, sealed
from storage.store import Store
from storage.verify import verify_artifacts
from storage.writer import ArtifactWriter
from tests.storage.making import RECIPE, VERSION, made, make, rows

KEY = f"artifacts/reference/{VERSION}"
ROOT = Path(__file__).parents[2]


@contextmanager
def writing(store: Store) -> Iterator[ArtifactWriter]:
    with store.hold("reference", VERSION, None) as hold:
        assert hold is not None
        yield store.writer("reference", VERSION, hold)


def test_a_finished_artifact_reads_back(store):
    make(store)
    assert store.state("reference", VERSION) == "complete"
    artifact = store.artifact("reference", VERSION)
    assert artifact.manifest["rows"] == 6
    assert artifact.manifest["stats"] == {"answer": 42}
    assert [table.num_rows for table in artifact.tables()] == [3, 3]
    assert artifact.scan().select("chosen_logp").collect()["chosen_logp"].sum() == 15.0
    assert artifact.num_shards() == 2


def test_without_a_manifest_nothing_is_there(store):
    assert store.state("reference", VERSION) == "missing"
    with writing(store) as writer:
        writer.put_shard(0, {"": rows(0)})
    assert store.state("reference", VERSION) == "partial"
    with pytest.raises(ArtifactMissing, match="not finished"):
        store.artifact("reference", VERSION)


def test_an_interrupted_writer_goes_on_after_its_receipts(store):
    with writing(store) as writer:
        writer.put_shard(0, {"": rows(0)})
    with writing(store) as again:
        assert set(again.finished_shards()) == {0}
        again.put_shard(1, {"": rows(3)})
        assert again.commit(made(RECIPE)).manifest["rows"] == 6


def test_a_shard_cut_short_or_lost_is_not_finished(store, place):
    with writing(store) as writer:
        for shard in range(3):
            writer.put_shard(shard, {"": rows(shard)})
    first = f"{KEY}/data/00000.parquet"
    place.write(first, place.read(first)[:50])
    place.remove(f"{KEY}/data/00002.parquet")
    with writing(store) as writer:
        assert set(writer.finished_shards()) == {1}


def test_a_receipt_cut_short_is_no_receipt(store, place):
    with writing(store) as writer:
        writer.put_shard(0, {"": rows(0)})
        receipt = f"{KEY}/parts/00000.json"
        place.write(receipt, place.read(receipt)[:20])
        assert writer.finished_shards() == {}


def test_a_gap_in_the_shards_is_not_committed(store):
    with writing(store) as writer:
        writer.put_shard(1, {"": rows(0)})
        with pytest.raises(StoreError, match=r"shards \[1\] have gaps"):
            writer.commit(made(RECIPE))
    assert store.state("reference", VERSION) == "partial"


def test_a_wrong_table_is_refused_before_it_is_written(store):
    with writing(store) as writer, pytest.raises(StoreError, match="chosen_tokens"):
        writer.put_shard(0, {"": rows(0).drop(["chosen_tokens"])})
    assert store.state("reference", VERSION) == "missing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"it has \d+ bytes, written were"),
        (lambda data: b"X" + data[1:], "its sha256 is"),
        (lambda _: None, "it is missing"),
    ],
)
def test_damage_is_found_when_read_and_named(store, place, damage, message):
    make(store)
    file = f"{KEY}/data/00001.parquet"
    changed = damage(place.read(file))
    if changed is None:
        place.remove(file)
    else:
        place.write(file, changed)
    artifact = store.artifact("reference", VERSION)
    assert artifact.table(shard=0).num_rows == 3
    with pytest.raises(ArtifactCorrupt, match=rf"reference/{VERSION}.*00001.parquet: {message}"):
        artifact.table(shard=1)


def test_two_swapped_shards_are_found(store, place):
    make(store)
    one, two = (f"{KEY}/data/0000{n}.parquet" for n in (0, 1))
    first, second = place.read(one), place.read(two)
    place.write(one, second)
    place.write(two, first)
    (verdict,) = verify_artifacts(store, list_artifacts(store), lambda _: None)
    assert set(verdict.bad_files) == {"00000.parquet", "00001.parquet"}
    with pytest.raises(ArtifactCorrupt, match="00000.parquet"):
        store.artifact("reference", VERSION).table(shard=0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:100], "is not JSON"),
        (lambda _: "[]", "is no manifest"),
        (lambda text: text.replace(VERSION, "f" * 16), "is that of another artifact"),
        (lambda text: text.replace('"answer": 42', '"answer": 43'), "was changed after it was"),
        (lambda text: text.replace('"answer": 42', '"answer": NaN'), "was changed after it was"),
        (lambda text: text.replace('"answer": 42', '"a": "\\ud800"'), "was changed after it was"),
        (lambda text: text.replace('"files":', '"filed":'), "was changed after it was"),
    ],
)
def test_a_manifest_edited_by_hand_is_refused(store, place, edit, message):
    make(store)
    before = place.read(f"{KEY}/manifest.json").decode()
    changed = edit(before)
    assert changed != before
    place.write(f"{KEY}/manifest.json", changed.encode())
    with pytest.raises(ArtifactCorrupt, match=f"damaged: its manifest {message}"):
        store.artifact("reference", VERSION)
    (info,) = list_artifacts(store)
    assert info.state == "corrupt"
    assert message in info.reason


def test_another_format_is_no_damage(store, place):
    """What a newer program wrote is left alone: neither verified nor repaired nor collected."""
    make(store)
    key = f"{KEY}/manifest.json"
    newer = place.read(key).replace(b'"format_version": 2', b'"format_version": 9')
    place.write(key, newer)
    with pytest.raises(OtherFormat, match="format version 9, this program reads 2"):
        store.artifact("reference", VERSION)
    (info,) = list_artifacts(store)
    assert info.state == "other format"
    assert verify_artifacts(store, [info], lambda _: None) == []
    store.set_ref("mine", "reference", VERSION)
    with pytest.raises(StoreError, match="nothing is removed"):
        find_garbage(store, grace_hours=0)


def test_a_manifest_sealed_anew_does_not_fit_its_version(store, place):
    """Who edits and seals again is still found: the version follows from recipe and inputs."""
    make(store)
    key = f"{KEY}/manifest.json"
    manifest = json.loads(place.read(key))
    place.write(key, json.dumps(sealed({**manifest, "recipe": {"dtype": "bfloat16"}})).encode())
    (verdict,) = verify_artifacts(store, list_artifacts(store), lambda _: None)
    assert not verdict.ok
    assert "inputs and recipe give the version" in verdict.manifest_fault


def test_names_in_a_manifest_cannot_leave_the_store(store, place):
    make(store)
    key = f"{KEY}/manifest.json"
    manifest = json.loads(place.read(key))
    manifest["files"]["../../../etc/passwd"] = FileRecord(1, "0" * 64)._asdict()
    place.write(key, json.dumps(sealed(manifest)).encode())
    with pytest.raises(StoreError, match="not a name in a store"):
        store.artifact("reference", VERSION).path("../../../etc/passwd")


def test_the_seal_is_what_the_documentation_says(store, place):
    """Computed here from the words of docs/storage.md alone."""
    import hashlib

    make(store)
    manifest = json.loads(place.read(f"{KEY}/manifest.json"))
    seal = manifest.pop("seal")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == seal


def test_a_writer_that_comes_late_gets_what_is_there_and_leaves_nothing(store, place):
    """Past the hold, as if it had been cut off: the manifest that stands is not written over."""
    with writing(store) as late:
        finished = make_past_the_hold(store)
        before = place.keys()
        late.put_bytes("leftover.json", b"{}")
        assert late.commit(made(RECIPE, answer=7)).manifest == finished.manifest
    assert place.keys() == before


def make_past_the_hold(store):
    class Free:
        def check(self) -> None:
            pass

    writer = ArtifactWriter(store.backend, "reference", VERSION, Free())
    for shard in range(2):
        writer.put_shard(shard, {"": rows(3 * shard)})
    return writer.commit(made(RECIPE, answer=42))


def test_a_run_that_lost_its_hold_writes_nothing_more(store, place):
    class Lost:
        def check(self) -> None:
            raise HoldLost("another run took over")

    writer = ArtifactWriter(store.backend, "reference", VERSION, Lost())
    with pytest.raises(HoldLost):
        writer.put_shard(0, {"": rows(0)})
    with pytest.raises(HoldLost):
        writer.commit(made(RECIPE))
    assert place.keys() == []


def test_files_of_an_earlier_attempt_do_not_stay_beside_the_artifact(store, place):
    with writing(store) as writer:
        writer.put_bytes("old-name.parquet", b"of an attempt that was killed")
    make(store)
    assert place.keys(f"{KEY}/data/") == [f"{KEY}/data/0000{n}.parquet" for n in (0, 1)]


def test_a_manifest_holds_no_path_and_no_environment(store, tmp_path, monkeypatch):
    from storage.provenance import provenance

    monkeypatch.setenv("SOME_SECRET", "a-very-secret-value")
    text = json.dumps([dict(make_past_the_hold(store).manifest), provenance()])
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert "a-very-secret-value" not in text


def test_refs_follow_and_are_listed(store):
    make(store)
    store.set_ref("quickstart", "reference", VERSION)
    store.set_ref("quickstart", "reference", VERSION)
    assert store.ref("quickstart", "reference") == VERSION
    assert store.ref("quickstart", "pairs") is None
    (info,) = list_artifacts(store)
    assert (info.state, info.rows, info.refs) == ("complete", 6, ("quickstart",))
    assert find_artifact(store, f"reference/{VERSION[:4]}") == info
    with pytest.raises(ArtifactMissing, match="fpo store ls"):
        find_artifact(store, "zzzz")


@pytest.mark.parametrize("name", ["../x", "/etc", "a\nb", "a/../../b", ""])
def test_names_of_recipes_and_artifacts_are_refused_before_any_io(store, place, name):
    for operation in (
        lambda: store.set_ref(name, "pairs", VERSION), lambda: store.artifact("pairs", name),
        lambda: store.artifact(name, VERSION), lambda: store.state("pairs", name),
        lambda: store.put_run(name, {}),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="not a name in a store"):
            operation()
    assert place.keys() == []


def test_discard_leaves_nothing(store, place):
    make(store)
    store.discard("reference", VERSION)
    assert store.state("reference", VERSION) == "missing"
    assert list_artifacts(store) == []
    assert place.keys() == []


def test_unfinish_takes_the_bad_shards_and_keeps_the_others(store):
    before = make(store, shards=range(3)).files
    store.unfinish("reference", VERSION, ["00001.parquet"])
    assert store.state("reference", VERSION) == "partial"
    with writing(store) as writer:
        assert set(writer.finished_shards()) == {0, 2}
        writer.put_shard(1, {"": rows(3)})
        assert writer.commit(made(RECIPE)).files == before


def test_a_writer_killed_at_any_moment_leaves_no_half_artifact(place):
    """SIGKILL after a random while, again and again; each start goes on, the last one commits."""
    code = f"""
from storage.location import open_store
from tests.storage.making import RECIPE, VERSION, made, rows
store = open_store({place.url!r})
with store.hold("reference", VERSION, lambda: None) as hold:
    if store.state("reference", VERSION) != "complete":
        writer = store.writer("reference", VERSION, hold)
        print("started", flush=True)
        for shard in sorted(set(range(40)) - set(writer.finished_shards())):
            writer.put_shard(shard, {{"": rows(3 * shard)}})
        writer.commit(made(RECIPE))
"""
    store = place.open()
    kills = 0
    for pause in (0.0, 0.01, 0.03, 0.05, 0.08, 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        if pause < 1:
            time.sleep(pause)
        else:
            process.wait(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if store.state("reference", VERSION) == "complete":
            break
    assert kills >= 2
    artifact = store.artifact("reference", VERSION)
    assert artifact.manifest["rows"] == 120
    ids = artifact.scan().select("pair_id").collect()["pair_id"].to_list()
    assert ids == [f"{n:016x}" for n in range(120)]


def test_an_artifact_that_is_removed_while_it_is_read(tmp_path):
    store = open_store(tmp_path / "store")
    artifact = make(store)
    artifact.shard_path(0)
    store.discard("reference", VERSION)
    with pytest.raises(ArtifactMissing, match="was removed while it was read"):
        artifact.table(shard=0)


def test_other_kinds_of_urls_are_refused_in_words():
    for url, message in (
        ("ftp://host/path", "stores are folders"),
        ("s3://key:secret@bucket/p", "credentials belong in"),
        ("s3://Bad_Bucket/p", "names no bucket"),
        ("s3://AKIAKEY:secret/p", "names no bucket"),
        ("s3://bucket/../other", "not a name in a store"),
        ("file://relative", "three slashes"),
        ("a\nb", "control characters"),
    ):
        with pytest.raises(StoreError, match=message) as caught:
            open_store(url)
        assert "secret" not in str(caught.value)


def test_a_manifest_of_json_that_is_no_object():
    with pytest.raises(ArtifactCorrupt, match="is no manifest"):
        read_manifest(b"3", "pairs", VERSION)
