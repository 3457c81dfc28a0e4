"""Artifacts: committed whole or not at all, resumed by receipt, verified when read."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from storage import schemas
from storage.errors import ArtifactCorrupt, ArtifactMissing, StoreError
from storage.store import open_store

VERSION = "0123456789abcdef"


def rows(start: int, count: int = 3) -> pa.Table:
    values = [float(n) for n in range(start, start + count)]
    return pa.table(
        {
            "pair_id": [f"{n:016x}" for n in range(start, start + count)],
            "chosen_logp": values, "rejected_logp": values,
            "chosen_tokens": [1] * count, "rejected_tokens": [2] * count,
        },
        schema=schemas.REFERENCE,
    )  # fmt: skip


def commit(writer, **stats):
    return writer.commit(
        inputs={"pairs": "p" * 16}, recipe={"dtype": "float32"}, stats=stats, seconds=1.0,
        provenance={},
    )  # fmt: skip


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


@pytest.fixture
def finished(store):
    writer = store.writer("reference", VERSION)
    for shard in range(2):
        writer.put_shard(shard, {"": rows(3 * shard)})
    return commit(writer, answer=42)


def data_file(store, name: str = "00001.parquet") -> Path:
    return Path(store.url) / "artifacts" / "reference" / VERSION / "data" / name


def test_a_finished_artifact_reads_back(store, finished):
    assert store.state("reference", VERSION) == "complete"
    artifact = store.artifact("reference", VERSION)
    assert artifact.manifest["rows"] == 6
    assert artifact.manifest["stats"] == {"answer": 42}
    assert [table.num_rows for table in artifact.tables()] == [3, 3]
    assert artifact.scan().select("chosen_logp").collect()["chosen_logp"].sum() == 15.0
    assert artifact.num_shards() == 2


def test_without_a_manifest_nothing_is_there(store):
    assert store.state("reference", VERSION) == "missing"
    writer = store.writer("reference", VERSION)
    writer.put_shard(0, {"": rows(0)})
    assert store.state("reference", VERSION) == "partial"
    with pytest.raises(ArtifactMissing, match="not finished"):
        store.artifact("reference", VERSION)


def test_an_interrupted_writer_goes_on_after_its_receipts(store):
    store.writer("reference", VERSION).put_shard(0, {"": rows(0)})
    again = store.writer("reference", VERSION)
    assert set(again.finished_shards()) == {0}
    again.put_shard(1, {"": rows(3)})
    assert commit(again).manifest["rows"] == 6


def test_a_shard_cut_short_or_lost_is_not_finished(store):
    writer = store.writer("reference", VERSION)
    for shard in range(3):
        writer.put_shard(shard, {"": rows(shard)})
    data_file(store, "00000.parquet").write_bytes(data_file(store).read_bytes()[:50])
    data_file(store, "00002.parquet").unlink()
    writer.put_shard(3, {"": rows(9)})
    changed = data_file(store, "00003.parquet")
    changed.write_bytes(b"X" + changed.read_bytes()[1:])  # of the same size
    assert set(store.writer("reference", VERSION).finished_shards()) == {1}


def test_a_receipt_cut_short_is_no_receipt(store):
    writer = store.writer("reference", VERSION)
    writer.put_shard(0, {"": rows(0)})
    receipt = Path(store.url) / "artifacts" / "reference" / VERSION / "parts" / "00000.json"
    receipt.write_text(receipt.read_text()[:20])
    assert writer.finished_shards() == {}


def test_a_gap_in_the_shards_is_not_committed(store):
    writer = store.writer("reference", VERSION)
    writer.put_shard(1, {"": rows(0)})
    with pytest.raises(StoreError, match=r"shards \[1\] have gaps"):
        commit(writer)
    assert store.state("reference", VERSION) == "partial"


def test_a_wrong_table_is_refused_before_it_is_written(store):
    with pytest.raises(StoreError, match="chosen_tokens"):
        store.writer("reference", VERSION).put_shard(0, {"": rows(0).drop(["chosen_tokens"])})
    assert store.state("reference", VERSION) == "missing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"it has \d+ bytes, written were"),
        (lambda path: path.write_bytes(b"X" + path.read_bytes()[1:]), "its sha256 is"),
        (lambda path: path.unlink(), "it is missing"),
    ],
)
def test_damage_is_found_when_read_and_named(store, finished, damage, message):
    damage(data_file(store))
    artifact = store.artifact("reference", VERSION)
    assert artifact.table(shard=0).num_rows == 3
    with pytest.raises(ArtifactCorrupt, match=rf"reference/{VERSION}.*00001.parquet: {message}"):
        artifact.table(shard=1)


def test_a_damaged_manifest_is_named(store, finished):
    manifest = data_file(store).parents[1] / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    with pytest.raises(ArtifactCorrupt, match=r"damaged: its manifest is not JSON"):
        store.artifact("reference", VERSION)


def test_two_writers_make_one_artifact(store, finished):
    """The one that comes later gets what is there; it does not write over it."""
    late = commit(store.writer("reference", VERSION), answer=7)
    assert late.manifest == finished.manifest


def test_a_manifest_holds_no_path_and_no_environment(store, finished, tmp_path, monkeypatch):
    from storage.provenance import provenance

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-value")
    text = json.dumps([dict(finished.manifest), provenance()])
    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
    assert "a-very-secret-value" not in text


def test_refs_follow_and_are_listed(store, finished):
    store.set_ref("quickstart", "reference", VERSION)
    store.set_ref("quickstart", "reference", VERSION)
    assert store.ref("quickstart", "reference") == VERSION
    assert store.ref("quickstart", "pairs") is None
    (info,) = store.artifacts()
    assert (info.state, info.rows, info.refs) == ("complete", 6, ("quickstart",))
    assert store.find("reference/0123") == info
    with pytest.raises(ArtifactMissing, match="fpo store ls"):
        store.find("ffff")


def test_discard_leaves_nothing(store, finished):
    store.discard("reference", VERSION)
    assert store.state("reference", VERSION) == "missing"
    assert store.artifacts() == []


def test_only_folders_are_opened():
    with pytest.raises(StoreError, match="ftp://host"):
        open_store("ftp://host/path")


def test_a_writer_killed_at_any_moment_leaves_no_half_artifact(tmp_path):
    """SIGKILL after a random while, again and again; each start goes on, the last one commits."""
    code = f"""
import sys
from tests.storage.test_artifact import VERSION, commit, rows
from storage.store import open_store
store = open_store({str(tmp_path / "store")!r})
if store.state("reference", VERSION) != "complete":
    writer = store.writer("reference", VERSION)
    print("started", flush=True)
    for shard in sorted(set(range(40)) - set(writer.finished_shards())):
        writer.put_shard(shard, {{"": rows(3 * shard)}})
    commit(writer)
"""
    root = Path(__file__).parents[2]
    store = open_store(tmp_path / "store")
    kills = 0
    for pause in (0.0, 0.01, 0.03, 0.05, 0.08, 60.0):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(root)},
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
