"""Folders, globs and datasets that were saved to disk."""

import json

import datasets
import pytest

from fpo_core.data.sources import count_rows, identify_data, read_rows
from fpo_core.data.sources.hub import hub_split
from fpo_core.errors import FPOError
from tests.fpo_core.data.writing import ROWS, values, write


def wheres(source):
    return [row.where for row in read_rows(source)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_in = tmp_path / "prefs"
    (write_in / "more" / "deep").mkdir(parents=True)
    write(write_in / "b.jsonl", ROWS[:1])
    write(write_in / "a.parquet", ROWS[1:2])
    write(write_in / "more" / "deep" / "d.csv.gz", ROWS[2:])
    (write_in / "README.md").write_text("# Data")
    (write_in / "LICENSE").write_text("Free")
    (write_in / "dataset_infos.json").write_text("{}")
    (write_in / ".hidden.jsonl").write_text("no JSON")
    (write_in / "_SUCCESS").touch()
    (write_in / "more" / "again").symlink_to(write_in)
    return write_in


def test_a_folder_is_read_in_the_order_of_names(folder):
    assert values("prefs") == [ROWS[1], ROWS[0], ROWS[2]]
    assert count_rows("prefs") == 3
    assert wheres("prefs") == [
        "prefs/a.parquet, row 1",
        "prefs/b.jsonl, line 1",
        "prefs/more/deep/d.csv.gz, line 2",
    ]
    assert values("prefs/") == values(folder)


def test_files_of_unknown_kinds_are_named(folder, caplog):
    (folder / "notes.txt").write_text("Remember the milk")
    (folder / "extra").write_text(json.dumps(ROWS[0]))
    assert len(values("prefs")) == 4
    assert [one.getMessage() for one in caplog.records] == [
        "data: prefs/notes.txt is skipped, it is of no kind of data file"
    ]


def test_globs(folder):
    assert wheres("prefs/*.jsonl") == ["prefs/b.jsonl, line 1"]
    assert wheres("prefs/[ab].*") == ["prefs/a.parquet, row 1", "prefs/b.jsonl, line 1"]
    assert wheres("prefs/more/**/*.gz") == ["prefs/more/deep/d.csv.gz, line 2"]
    assert len(values(f"{folder}/*")) == 2
    with pytest.raises(FPOError, match=r"'prefs/\*\.arrow' matches no data file"):
        list(read_rows("prefs/*.arrow"))


def test_the_identity_follows_names_and_contents(folder):
    before = {source: identify_data(source).value for source in ("prefs", "prefs/*.*")}
    assert all(value.startswith("files:") for value in before.values())
    assert identify_data(str(folder)).value == before["prefs"]
    write(folder / "c.jsonl", ROWS[:1])
    added = {source: identify_data(source).value for source in before}
    (folder / "c.jsonl").rename(folder / "0.jsonl")
    renamed = {source: identify_data(source).value for source in before}
    (folder / "0.jsonl").unlink()
    for source, value in before.items():
        assert len({value, added[source], renamed[source]}) == 3
        assert identify_data(source).value == value
    folder.rename(folder.with_name("moved"))
    assert identify_data("moved").value == before["prefs"]


def test_splits_are_never_mixed(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.parquet"):
        write(tmp_path / name, ROWS[:1])
    with pytest.raises(FPOError, match=r"several splits: test, train\. Name one, as .*:train"):
        list(read_rows(tmp_path))
    assert wheres(f"{tmp_path}:train") == [
        f"{tmp_path}/train-0000{number}-of-00002.jsonl, line 1" for number in (0, 1)
    ]
    assert len(values(f"{tmp_path}:train[1:]")) == 1
    assert len(values(f"{tmp_path}/*")) == 3
    with pytest.raises(FPOError, match="name no such split; found: test, train"):
        list(read_rows(f"{tmp_path}:dev"))


def test_a_saved_dataset_is_what_datasets_loads(tmp_path):
    rows = [{"prompt": str(number), "chosen": [{"role": "assistant"}]} for number in range(25)]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(tmp_path / "saved", num_shards=12)
    made.shuffle(seed=3).save_to_disk(tmp_path / "shuffled")
    for name in ("saved", "shuffled"):
        assert values(tmp_path / name) == datasets.load_from_disk(str(tmp_path / name)).to_list()
        assert count_rows(tmp_path / name) == 25
    assert wheres(tmp_path / "saved")[-1].startswith(
        f"{tmp_path}/saved/data-00011-of-00012.arrow, "
    )
    # The order is that of state.json, and nothing else in the folder is read.
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    state["_data_files"].reverse()
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
    (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"ARROW1")
    theirs = datasets.load_from_disk(str(tmp_path / "saved"))["prompt"]
    assert [row["prompt"] for row in values(tmp_path / "saved")] == list(theirs)
    assert theirs[0] != "0"


def test_a_saved_dict_of_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = {"train": ROWS, "test_prefs": ROWS[:1]}
    made = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "own/saved")
    with pytest.raises(FPOError, match=r"DatasetDict with the splits train, test_prefs\. Name one"):
        list(read_rows("own/saved"))
    assert hub_split("own/saved:train") is None
    for name, rows in splits.items():
        assert values(f"own/saved:{name}") == rows
    assert wheres("own/saved:test_prefs") == [
        "own/saved/test_prefs/data-00000-of-00001.arrow, row 1"
    ]
    with pytest.raises(FPOError, match="the splits there are train, test_prefs"):
        list(read_rows("own/saved:dev"))


FAULTS = {
    "indices": ({"_indices_files": [{"filename": "i.arrow"}]}, r"dataset\.flatten_indices\(\)"),
    "missing": ({"_data_files": [{"filename": "gone.arrow"}]}, r"gone\.arrow missing"),
    "outside": ({"_data_files": [{"filename": "../d.arrow"}]}, r"it names no data files"),
    "nothing": ({}, r"it names no data files"),
    "no object": ([], r"state\.json: holds list, expected an object"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_saved_datasets_that_cannot_be_read(tmp_path, fault):
    state, message = FAULTS[fault]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(FPOError, match=message):
        list(read_rows(tmp_path))


def test_folders_without_data(tmp_path):
    (tmp_path / "README.md").write_text("#")
    with pytest.raises(FPOError, match=r"has no data files \(JSON, JSONL"):
        list(read_rows(tmp_path))
