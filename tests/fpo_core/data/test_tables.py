"""Parquet and Arrow files: every type, nulls, odd rows, and damage in any byte."""

import datetime as dt
import decimal
import io
import itertools
import random
import tracemalloc

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fpo_core.data.sources import count_rows, read_rows
from fpo_core.errors import FPOError
from tests.fpo_core.data.writing import ROWS, WRITERS, values, write

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
TYPES = {
    "string": (pa.array(["a", "b"]), "a"),
    "large": (pa.array(["a", "b"], pa.large_string()), "a"),
    "view": (pa.array(["a", "b"], pa.string_view()), "a"),
    "dictionary": (pa.array(["a", "b"]).dictionary_encode(), "a"),
    "binary": (pa.array([b"a", b"b"]), "a"),
    "binary view": (pa.array(["caf\u00e9".encode(), b"b"], pa.binary_view()), "café"),
    "list": (pa.array([["a"], []]), ["a"]),
    "large list": (pa.array([["a"], []], pa.large_list(pa.string())), ["a"]),
    "fixed list": (pa.array([["a"], ["b"]], pa.list_(pa.string(), 1)), ["a"]),
    "messages": (pa.array([MESSAGES, MESSAGES]), MESSAGES),
    "map": (pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())), {"a": 1}),
    "maps in a list": (
        pa.array([[[("a", None)]], []], pa.list_(pa.map_(pa.string(), pa.string()))),
        [{}],
    ),
    "bytes in messages": (pa.array([[{"content": b"Hi"}], []]), [{"content": "Hi"}]),
    "time": (pa.array([dt.datetime(2024, 5, 6, 7), None]), "2024-05-06 07:00:00.000000"),
    "nanoseconds": (pa.array([1, 2], pa.timestamp("ns")), "1970-01-01 00:00:00.000000001"),
    "day": (pa.array([dt.date(2024, 5, 6), None]), "2024-05-06"),
    "decimal": (pa.array([decimal.Decimal("1.25"), None]), 1.25),
    "number": (pa.array([1.5, 2.5]), 1.5),
    "half": (pa.array([1.5, 2.5], pa.float16()), 1.5),
    "unsigned": (pa.array([2**63 + 1, 1], pa.uint64()), 2**63 + 1),
    "boolean": (pa.array([True, False]), True),
}
ONLY_ARROW = {
    "list view": (pa.array([["a"], []], pa.list_view(pa.string())), ["a"]),
    "runs": (pc.run_end_encode(pa.array(["a", "a"])), "a"),
    "duration": (pa.array([3, 4], pa.duration("s")), 3),
}


def save(path, table):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    make = pa.ipc.new_file if path.suffix == ".feather" else pa.ipc.new_stream
    with path.open("wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *itertools.product(TYPES, [".parquet"]),
        *itertools.product([*TYPES, *ONLY_ARROW], [".arrow", ".feather"]),
    ],
)
def test_every_type(tmp_path, name, suffix):
    column, expected = (TYPES | ONLY_ARROW)[name]
    file = save(tmp_path / f"d{suffix}", pa.table({"column": column, "other": ["x", "y"]}))
    first, second = values(file)
    assert first == {"column": expected, "other": "x"}
    assert second["other"] == "y"
    assert count_rows(file) == 2


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_nulls_mean_absent_at_every_level(tmp_path, suffix):
    rows = [
        {"prompt": [{"role": "user", "content": "a", "calls": [{"name": "f", "args": {"x": 1}}]}]},
        {"prompt": [{"role": "user", "content": "b", "calls": None}], "chosen": "c"},
        {"prompt": [{"role": "user", "calls": [{"name": "g", "args": {"y": None}}]}, None]},
    ]
    schema = pa.schema(
        {
            "prompt": pa.array([rows[0]["prompt"], [{"calls": [{"args": {"y": 2}}]}]]).type,
            "chosen": pa.string(),
            "never": pa.null(),
        }
    )
    file = save(tmp_path / f"d{suffix}", pa.Table.from_pylist(rows, schema=schema))
    assert values(file) == [
        rows[0],
        {"prompt": [{"role": "user", "content": "b"}], "chosen": "c"},
        {"prompt": [{"role": "user", "calls": [{"name": "g", "args": {}}]}, None]},
    ]


def bad_text():
    """Return a column of strings whose second one is not UTF-8."""
    good = pa.array([b"fine", "caf\u00e9".encode("latin-1"), b"last"])
    return pa.Array.from_buffers(pa.string(), 3, good.buffers())


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_one_odd_value_is_a_fault_of_its_row(tmp_path, suffix):
    texts = ["a", "b", "c"]
    repeated = pa.MapArray.from_arrays([0, 1, 3, 4], ["k", "k", "k", "k"], ["1", "2", "3", "4"])
    for column, reason, detail in (
        (bad_text(), "not_unicode", "'odd' is not UTF-8 text"),
        (pa.array([b"a", b"\xff", b"c"]), "not_unicode", "'odd' has bytes, not UTF-8 text"),
        (repeated, "duplicate_key", "a map in 'odd' repeats a key"),
    ):
        file = save(tmp_path / f"d{suffix}", pa.table({"text": texts, "odd": column}))
        first, odd, last = read_rows(file)
        assert (odd.value, odd.fault.reason, odd.where) == ({}, reason, f"{file}, row 2")
        assert odd.fault.detail.startswith(detail)
        assert (first.value["text"], last.value["text"]) == ("a", "c")
        assert not first.fault
        assert not last.fault


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_two_columns_of_one_name_are_refused(tmp_path, suffix):
    file = save(tmp_path / f"d{suffix}", pa.table([["a"], ["b"]], names=["chosen", "chosen"]))
    with pytest.raises(FPOError, match="two columns are named 'chosen'. Rename or remove"):
        list(read_rows(file))
    struct = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    lists = pa.ListArray.from_arrays([0, 1], struct)
    with pytest.raises(FPOError, match=r"two columns are named 'prompt\.x'"):
        list(read_rows(save(tmp_path / f"e{suffix}", pa.table({"prompt": lists}))))


def test_the_row_group_with_damage_is_named_and_rows_before_it_are_read(tmp_path):
    rows = [{"prompt": f"{'word ' * 200}{number}"} for number in range(40)]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(rows),
        sink,
        row_group_size=10,
        use_dictionary=False,
        write_page_checksum=True,
    )
    place = pq.ParquetFile(sink).metadata.row_group(2).column(0)
    data = bytearray(sink.getvalue())
    data[place.data_page_offset + place.total_compressed_size - 20] ^= 0xFF
    (tmp_path / "d.parquet").write_bytes(data)
    read, stream = [], read_rows(tmp_path / "d.parquet")
    with pytest.raises(FPOError, match=r"d\.parquet: row group 3: not a readable Parquet file"):
        read.extend(row.value for row in stream)
    assert read == rows[:20]
    assert count_rows(tmp_path / "d.parquet") == 40


def test_a_stream_cut_between_two_batches_is_cut_off(tmp_path):
    data = WRITERS["d.arrow"](ROWS)
    (tmp_path / "d.arrow").write_bytes(data[:-8])
    with pytest.raises(FPOError, match="has no end mark, so it is cut off"):
        list(read_rows(tmp_path / "d.arrow"))


@pytest.mark.parametrize("name", [*WRITERS, "d.jsonl.gz", "d.jsonl.zst", "d.parquet.gz"])
def test_damage_anywhere_is_an_error_that_names_the_file_or_gives_rows(tmp_path, name):
    data = write(tmp_path / name, ROWS * 20).read_bytes()
    draw = random.Random(0)  # noqa: S311 - the same damage every time
    file = tmp_path / f"damaged{name[1:]}"
    for attempt in range(150):
        broken = bytearray(data)
        if attempt % 3 == 0:
            del broken[draw.randrange(len(broken)) :]
        else:
            for _ in range(draw.randrange(1, 4)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
        file.write_bytes(broken)
        told = str(file)
        try:
            assert all(isinstance(row.value, dict) for row in read_rows(file))
        except FPOError as error:
            told = str(error)
        assert str(file) in told


def test_reading_is_bounded_in_memory(tmp_path):
    rows = [{"prompt": f"{number} " + "word " * 400} for number in range(20_000)]  # 40 MB
    for name in ("d.parquet", "d.jsonl.gz", "list.json"):
        write(tmp_path / name, rows)
    del rows
    for name in ("d.parquet", "d.jsonl.gz", "list.json"):
        before = pa.total_allocated_bytes()
        number = peak = 0
        tracemalloc.start()
        for number, _ in enumerate(read_rows(tmp_path / name)):
            if number % 500 == 0:
                peak = max(peak, pa.total_allocated_bytes() - before)
        assert tracemalloc.get_traced_memory()[1] + peak < 16 << 20, name
        tracemalloc.stop()
        assert number == 19_999
