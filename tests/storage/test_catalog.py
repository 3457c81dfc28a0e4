"""Listing, lineage, verification, garbage collection and copies, on a folder and on S3."""

import datetime as dt
import json
import os

import pytest

from storage.catalog import list_artifacts
from storage.copy import copy_artifact, copy_records, with_ancestors
from storage.errors import ArtifactCorrupt, StoreError
from storage.gc import find_garbage, remove_garbage
from storage.lineage import Node, ancestors, descendants
from storage.location import open_store
from storage.store import Ref
from storage.verify import lost_refs, verify_artifacts
from tests.storage.making import make, rows, version_of

NOW = dt.datetime.now(dt.UTC)


def nothing(_bytes: int) -> None:
    """No progress is shown."""


def chain(store, name: str = "a"):
    """pairs -> reference -> policy -> evaluation, of a recipe called ``name``."""
    pairs = make(store, {"n": name}, {"model": "folder:abc", "train": "f" * 64}, "pairs-like")
    reference = make(
        store, {"n": name}, {"model": "folder:abc", "pairs-like": pairs.version}, "reference"
    )
    policy = make(
        store, {"n": name},
        {"reference": reference.version, "sae": f"artifact:{pairs.name}"}, "policy",
    )  # fmt: skip
    return pairs, reference, policy


def names(node: Node) -> list:
    return [node.name, [names(branch) for branch in node.branches]]


def test_states_show_at_a_glance(store, place):
    good = make(store, {"n": 1})
    bad = make(store, {"n": 2})
    cut = f"artifacts/{bad.name}/data/00000.parquet"
    place.write(cut, place.read(cut)[:-1])
    partial = version_of({"n": 3})
    with store.hold("reference", partial, None) as hold:
        store.writer("reference", partial, hold).put_shard(0, {"": rows(0)})
    store.set_ref("mine", "reference", good.version)
    found = {info.version: info for info in list_artifacts(store)}
    assert found[good.version].state == "complete"
    assert found[good.version].refs == ("mine",)
    assert found[bad.version].state == "corrupt"
    assert "00000.parquet has" in found[bad.version].reason
    assert found[partial].state == "partial"
    assert found[partial].bytes > 0


def test_lineage_goes_both_ways_down_to_models_and_data(store):
    pairs, reference, policy = chain(store)
    infos = list_artifacts(store)
    above = names(ancestors(policy.name, infos))
    leaves = [["model:folder:abc", []], [f"train:{'f' * 64}", []]]
    of_pairs = [pairs.name, leaves]
    assert above == [
        policy.name,
        [[reference.name, [["model:folder:abc", []], of_pairs]], of_pairs],
    ]
    below = names(descendants(pairs.name, infos))
    assert below == [pairs.name, [[reference.name, [[policy.name, []]]], [policy.name, []]]]


def test_an_ancestor_that_is_gone_is_said_to_be(store):
    pairs, reference, _ = chain(store)
    store.discard("pairs-like", pairs.version)
    tree = ancestors(reference.name, list_artifacts(store))
    assert {branch.name: branch.state for branch in tree.branches} == {
        "model:folder:abc": "external", pairs.name: "missing",
    }  # fmt: skip


def test_verify_reads_every_byte_and_every_ref(store, place):
    good, bad, unread = make(store, {"n": 1}), make(store, {"n": 2}), make(store, {"n": 3})
    flipped = f"artifacts/{bad.name}/data/00001.parquet"
    data = bytearray(place.read(flipped))
    data[len(data) // 2] ^= 1
    place.write(flipped, bytes(data))
    place.write(f"artifacts/{unread.name}/manifest.json", b"{")
    place.remove(f"artifacts/{unread.name}/data/00000.parquet")
    store.set_ref("good", "reference", good.version)
    store.set_ref("lost", "reference", "0" * 16)
    place.write("refs/odd/pairs.json", b"not json")
    read = []
    infos = list_artifacts(store)
    verdicts = {v.name: v for v in verify_artifacts(store, infos, read.append)}
    assert verdicts[good.name].ok
    assert list(verdicts[bad.name].bad_files) == ["00001.parquet"]
    # A manifest that says nothing: the receipts tell which shards are good.
    assert "is not JSON" in verdicts[unread.name].manifest_fault
    assert verdicts[unread.name].bad_files == {"00000.parquet": "it is missing"}
    assert sum(read) == sum(v.bytes for v in verdicts.values())
    assert sorted(line.split()[0] for line in lost_refs(store, infos)) == [
        "refs/lost/reference.json", "refs/odd/pairs.json",
    ]  # fmt: skip


def test_refs_that_cannot_be_read_do_not_stop_a_listing(store, place):
    made = make(store)
    place.write("refs/odd/reference.json", b"[]")
    store.set_ref("mine", "reference", made.version)
    assert store.refs() == [
        Ref("mine", "reference", made.version), Ref("odd", "reference", None),
    ]  # fmt: skip
    assert list_artifacts(store)[0].refs == ("mine",)


def test_stray_files_do_not_stop_a_listing(store, place):
    made = make(store)
    for key in ("artifacts/note.txt", "artifacts/reference/.DS_Store", "refs/.DS_Store",
                "refs/x/deeper/pairs.json", "runs/readme.txt"):  # fmt: skip
        place.write(key, b"x")
    assert [info.name for info in list_artifacts(store)] == [made.name]
    assert store.refs() == []
    assert store.runs() == {}
    assert find_garbage(store, grace_hours=0).artifacts == tuple(list_artifacts(store))


# ---- garbage


def run(*artifacts, days_ago: float = 0.0) -> dict:
    started = NOW - dt.timedelta(days=days_ago)
    return {
        "started": started.isoformat(),
        "artifacts": {str(n): artifact.name for n, artifact in enumerate(artifacts)},
    }


def test_garbage_is_what_nothing_reaches(store):
    by_ref, by_run, old = chain(store, "ref"), chain(store, "run"), chain(store, "old")
    store.set_ref("mine", "policy", by_ref[-1].version)
    store.put_run("recent", run(by_run[1], days_ago=3))
    store.put_run("long-ago", run(old[-1], days_ago=30))
    found = find_garbage(store, grace_hours=0)
    expected = {by_run[2].name, *(artifact.name for artifact in old)}
    assert {info.name for info in found.artifacts} == expected
    assert found.runs == ("long-ago",)
    assert len(list_artifacts(store)) == 9  # a dry run removes nothing
    assert {info.name for info in remove_garbage(store, grace_hours=0).artifacts} == expected
    assert {info.name for info in list_artifacts(store)} == {
        artifact.name for artifact in (*by_ref, *by_run[:2])
    }
    assert list(store.runs()) == ["recent"]
    assert all(v.ok for v in verify_artifacts(store, list_artifacts(store), nothing))


def test_the_grace_period_keeps_what_is_young(store):
    chain(store)
    found = find_garbage(store, grace_hours=1)
    assert found.artifacts == ()
    assert found.in_grace == 3
    assert remove_garbage(store, grace_hours=1).artifacts == ()


@pytest.mark.parametrize("started", [None, "2999-01-01", "not a date"])
def test_a_run_record_without_a_proper_date_keeps_its_artifacts(store, place, started):
    made = make(store)
    record = {"artifacts": {"a": made.name}, "started": started}
    place.write("runs/odd.json", json.dumps(record).encode())
    assert find_garbage(store, grace_hours=0).artifacts == ()


@pytest.mark.parametrize("key", ["refs/mine/reference.json", "runs/mine.json"])
def test_a_ref_or_run_record_that_is_damaged_removes_nothing(store, place, key):
    made = make(store)
    store.set_ref("mine", "reference", made.version)
    store.put_run("mine", run(made))
    place.write(key, place.read(key)[:10])
    with pytest.raises(StoreError, match=f"{key} cannot be read.*nothing is removed"):
        remove_garbage(store, grace_hours=0)
    assert len(list_artifacts(store)) == 1


def test_the_newest_record_of_what_stays_is_kept_for_its_repair(store):
    made, other = make(store, {"n": 1}), make(store, {"n": 2})
    store.set_ref("mine", "reference", made.version)
    store.put_run("first", run(made, other, days_ago=40))
    store.put_run("second", run(made, days_ago=30))
    assert remove_garbage(store, grace_hours=0).runs == ("first",)
    assert set(store.runs()) == {"second"}


def test_a_run_that_does_not_say_that_it_ended_is_taken_to_be_at_work(store):
    made = make(store)
    store.put_run("long", {**run(made, days_ago=30), "state": "running"})
    assert find_garbage(store, grace_hours=0, keep_runs_days=3).artifacts == ()
    store.put_run("long", {**run(made, days_ago=100), "state": "running"})
    assert len(find_garbage(store, grace_hours=0, keep_runs_days=3).artifacts) == 1


def test_work_in_progress_of_killed_runs_is_removed_after_the_grace_period(store, place):
    root = store.backend.scratch
    for name in ("policy-0123456789abcdef", "sae-fedcba9876543210"):
        (root / name / "attempt").mkdir(parents=True)
        (root / name / "attempt" / "weights").write_bytes(b"half")
    assert find_garbage(store, grace_hours=1).scratch == ()
    with place.open().hold("policy", "0123456789abcdef", None) as hold:
        assert hold is not None
        removed = remove_garbage(store, grace_hours=0).scratch
        assert [folder.name for folder in removed] == ["sae-fedcba9876543210"]
    assert [folder.name for folder in root.iterdir()] == ["policy-0123456789abcdef"]


def test_what_is_being_written_is_not_removed(store, place):
    made = make(store)
    with place.open().hold("reference", made.version, None) as hold:
        assert hold is not None
        assert remove_garbage(store, grace_hours=0).artifacts == ()
    assert len(remove_garbage(store, grace_hours=0).artifacts) == 1
    assert place.keys() == []


def test_a_run_that_starts_meanwhile_keeps_what_it_chose(store, place, monkeypatch):
    """Between the look and the removal a run records that it will reuse one of two artifacts."""
    one, two = make(store, {"n": 1}), make(store, {"n": 2})
    discard = store.discard

    def while_the_first_goes(stage, version):
        other = one if version == two.version else two
        place.open().put_run("just-started", run(other))
        discard(stage, version)

    monkeypatch.setattr(store, "discard", while_the_first_goes)
    assert len(remove_garbage(store, grace_hours=0).artifacts) == 1
    assert len(list_artifacts(store)) == 1


def test_nothing_is_removed_while_a_needed_artifact_is_unreadable(store, place):
    """What it was made from would look like garbage, and repairing it needs just that."""
    _, _, policy = chain(store)
    store.set_ref("mine", "policy", policy.version)
    key = f"artifacts/{policy.name}/manifest.json"
    place.write(key, place.read(key)[:-20])
    with pytest.raises(StoreError, match=f"fpo store repair {policy.name}` first"):
        remove_garbage(store, grace_hours=0)
    assert len(list_artifacts(store)) == 3


# ---- copies


@pytest.fixture
def target(tmp_path):
    return open_store(tmp_path / "target")


def test_a_copy_takes_the_ancestors_and_is_the_same(store, target):
    _, _, policy = chain(store)
    make(store, {"n": "other"})
    store.set_ref("mine", "policy", policy.version)
    infos = list_artifacts(store)
    chosen = with_ancestors([policy.name], infos)
    assert [info.stage for info in chosen] == ["pairs-like", "reference", "policy"]
    done = [copy_artifact(store, target, info, nothing) for info in chosen]
    assert {one.state for one in done} == {"copied"}
    copy_records(store, target, [info.name for info in chosen], move_refs=True)
    assert target.ref("mine", "policy") == policy.version
    assert {info.name for info in list_artifacts(target)} == {info.name for info in chosen}
    for info in chosen:
        theirs, ours = (s.artifact(info.stage, info.version).manifest for s in (target, store))
        assert theirs == ours
    assert all(v.ok for v in verify_artifacts(target, list_artifacts(target), nothing))
    again = [copy_artifact(store, target, info, nothing) for info in chosen]
    assert {one.state for one in again} == {"there already"}


def test_a_copy_goes_on_where_it_stopped(store, target, monkeypatch):
    made = make(store, shards=range(4))
    (info,) = list_artifacts(store)
    sent = []
    put_file = target.backend.put_file

    def cut_off(key, path, on_bytes):
        if len(sent) == 2:
            raise StoreError("the network went away")
        sent.append(key)
        return put_file(key, path, on_bytes)

    monkeypatch.setattr(target.backend, "put_file", cut_off)
    with pytest.raises(StoreError):
        copy_artifact(store, target, info, nothing)
    assert target.state("reference", made.version) != "complete"
    monkeypatch.undo()
    done = copy_artifact(store, target, info, nothing)
    assert done.bytes < info.bytes
    assert all(v.ok for v in verify_artifacts(target, list_artifacts(target), nothing))
    assert [p for p in target.backend.scratch.rglob("*") if p.is_file()] == []


def test_another_attempts_file_of_the_same_size_is_not_taken_for_the_copy(place, tmp_path):
    """Two trainings give files of one size and other bytes; sizes alone would pass on S3."""
    source, target = open_store(tmp_path / "source"), place.open()
    made = make(source)
    key = f"artifacts/{made.name}/data/00000.parquet"
    data = bytearray((tmp_path / "source" / key).read_bytes())
    data[len(data) // 2] ^= 1
    place.write(key, bytes(data))
    copy_artifact(source, target, list_artifacts(source)[0], nothing)
    assert all(v.ok for v in verify_artifacts(target, list_artifacts(target), nothing))


def test_what_refers_to_a_copy_comes_along(store, target):
    made, other = make(store, {"n": 1}), make(store, {"n": 2})
    for name, artifact in (("mine", made), ("other", other)):
        store.set_ref(name, "reference", artifact.version)
    store.put_run("old", run(made, other, days_ago=2))
    store.put_run("new", run(made, days_ago=1))
    target.set_ref("mine", "reference", "f" * 16)
    (info,) = (info for info in list_artifacts(store) if info.name == made.name)
    copy_artifact(store, target, info, nothing)
    copy_records(store, target, [made.name], move_refs=False)
    assert set(target.runs()) == {"new"}
    assert {(ref.recipe, ref.version) for ref in target.refs()} == {("mine", "f" * 16)}
    copy_records(store, target, [made.name], move_refs=True)
    assert target.ref("mine", "reference") == made.version
    assert find_garbage(target, grace_hours=0).artifacts == ()


def test_a_damaged_source_is_not_copied(store, place, target):
    made = make(store)
    file = f"artifacts/{made.name}/data/00001.parquet"
    data = place.read(file)
    place.write(file, data[:-1] + b"X")
    (info,) = list_artifacts(store)
    with pytest.raises(ArtifactCorrupt, match=r"00001.parquet: its sha256"):
        copy_artifact(store, target, info, nothing)
    assert target.state("reference", made.version) != "complete"


def test_a_local_copy_shares_no_file_with_its_source(tmp_path, target):
    source = open_store(tmp_path / "source")
    made = make(source)
    copy_artifact(source, target, list_artifacts(source)[0], nothing)
    paths = [s.artifact("reference", made.version).shard_path(0) for s in (source, target)]
    assert not os.path.samefile(*paths)
