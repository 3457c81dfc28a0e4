"""Slices mean the rows that the datasets library means by them."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_core.data.sources import count_rows, identify_data, read_rows
from fpo_core.data.sources.hub import hub_split
from fpo_core.data.sources.slices import Slice, split_slice
from fpo_core.errors import FPOError
from tests.fpo_core.data.writing import WRITERS, write

ends = st.none() | st.integers(-120, 120)


@given(ends, ends, st.booleans(), st.integers(0, 250))
def test_bounds_are_those_of_datasets(start, stop, percent, num_rows):
    if percent:
        start, stop = (None if end is None else max(min(end, 100), -100) for end in (start, stop))
    part = Slice(start, stop, percent)
    spec = f"train{part}"
    (expected,) = datasets.ReadInstruction.from_spec(spec).to_absolute({"train": num_rows})
    theirs = range(num_rows)[expected.from_ : expected.to]
    assert list(part.bounds(num_rows)) == list(theirs)
    if not part.needs_count:
        assert list(part.bounds(1_000)[:num_rows])[: len(theirs)] == list(theirs)


@given(ends, ends, st.booleans())
def test_a_slice_is_read_as_it_is_written(start, stop, percent):
    part = Slice(start, stop, percent and (start, stop) != (None, None))
    assert split_slice(f"o/n:train{part}") == ("o/n:train", part)


ROWS = [{"prompt": str(number)} for number in range(37)]
SPECS = ["[:10%]", "[10:20]", "[:5]", "[-10%:]", "[20%:30%]", "[-3:]", "[:-30]", "[30:100]", "[:]"]


@pytest.mark.parametrize("spec", SPECS)
def test_files_are_sliced_as_datasets_slices_them(tmp_path, spec):
    write(tmp_path / "theirs.jsonl", ROWS)
    theirs = datasets.load_dataset(
        "json",
        data_files=str(tmp_path / "theirs.jsonl"),
        split=f"train{spec}",
        cache_dir=str(tmp_path / "cache"),
    )
    for name in WRITERS:
        file = write(tmp_path / name, ROWS)
        rows = list(read_rows(f"{file}{spec}"))
        assert [row.value["prompt"] for row in rows] == theirs["prompt"], name
        assert count_rows(f"{file}{spec}") == len(rows)
        if name == "d.parquet":
            assert rows[0].where == f"{file}, row {int(rows[0].value['prompt']) + 1}"


def test_a_slice_of_a_folder_goes_over_all_its_files(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:10])
    write(tmp_path / "b.parquet", ROWS[10:])
    rows = list(read_rows(f"{tmp_path}[8:12]"))
    assert [row.value["prompt"] for row in rows] == ["8", "9", "10", "11"]
    assert rows[-1].where == f"{tmp_path}/b.parquet, row 2"


def test_the_slice_is_part_of_the_identity(tmp_path):
    file = write(tmp_path / "d.jsonl", ROWS)
    whole = identify_data(str(file)).value
    assert identify_data(f"{file}[:10%]").value == f"{whole}[:10%]"
    assert identify_data(f"{file}[:010%]").value == f"{whole}[:10%]"


def test_what_is_no_slice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d[1:2]").write_text('{"prompt": "the file of this name"}')
    assert [row.value["prompt"] for row in read_rows("d[1:2]")] == ["the file of this name"]
    with pytest.raises(FPOError, match="in percent and the other in rows"):
        split_slice("o/n:train[10:20%]")
    with pytest.raises(FPOError, match=r"slice \[50:60\] of data 'e\.jsonl' holds no rows"):
        list(read_rows(f"{write(tmp_path / 'e.jsonl', ROWS).name}[50:60]"))
    with pytest.raises(FPOError, match="a slice cannot follow a glob"):
        list(read_rows("*.jsonl[:3]"))
    assert hub_split("o/n:train[:3]")[1:] == ("o/n", None, None, "train")


def test_bytes_of_a_row_with_a_fault_count(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n[1]\n{"a": 2}\n')
    assert count_rows(tmp_path / "d.jsonl") == 3
    assert [row.value for row in read_rows(f"{tmp_path / 'd.jsonl'}[-1:]")] == [{"a": 2}]
