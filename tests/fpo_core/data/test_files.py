"""Single files: every kind gives the same rows, and every fault is named by file and line."""

import csv
import gzip
import io
import json
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_core.data.sources import count_rows, identify_data, read_rows, read_sound_rows
from fpo_core.data.sources.json_text import JsonParser, JsonText
from fpo_core.errors import FPOError
from tests.fpo_core.data.writing import ROWS, WRITERS, values, write

CASES = Path("../shared/data/cases/preferences")
LINE = json.dumps(ROWS[0]) + "\n"


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path, name, compression):
    file = write(tmp_path / (name + compression), ROWS)
    assert values(file) == ROWS
    assert count_rows(file) == len(ROWS)
    assert all(row.where.startswith(f"{file}, ") for row in read_rows(file))


@pytest.mark.parametrize("name", ["d.jsonl", "d.JSONL", "d.ndjson", "d.json", "d.txt", "d", "d.gz"])
def test_a_row_per_line_is_read_under_any_name(tmp_path, name):
    file = tmp_path / name
    file.write_text(LINE + "\n" + LINE.replace("\n", "\r\n"))
    assert values(file) == [ROWS[0], ROWS[0]]
    assert [row.where for row in read_rows(file)] == [f"{file}, line 1", f"{file}, line 3"]


def test_the_content_decides_what_a_suffix_says_wrongly(tmp_path):
    for real, named in (("d.parquet", "d.jsonl"), ("d.arrow", "e"), ("d.jsonl.gz", "d.csv.old")):
        write(tmp_path / real, ROWS).rename(tmp_path / named)
        assert values(tmp_path / named) == ROWS
    write(tmp_path / "list.json", ROWS).rename(tmp_path / "list.jsonl")
    assert values(tmp_path / "list.jsonl") == ROWS


def test_bytes_that_belong_to_the_text(tmp_path):
    file = tmp_path / "d.jsonl"
    text = "One\u2028two\u2029three\x85four\x0bfive\tsix\rseven"
    file.write_bytes(
        b"\xef\xbb\xbf"
        + f'{{"prompt": "{text}"}}\r\n'.encode()
        + '\ufeff{"prompt": "2"}\n'.encode()
    )
    assert [row["prompt"] for row in values(file)] == [text, "2"]
    (tmp_path / "bom.json").write_text("\ufeff" + json.dumps(ROWS))
    (tmp_path / "bom.csv").write_text("\ufeffprompt,chosen\na,b\n")
    assert values(tmp_path / "bom.json") == ROWS
    assert values(tmp_path / "bom.csv") == [{"prompt": "a", "chosen": "b"}]


def test_numbers_of_any_size(tmp_path):
    file = tmp_path / "d.jsonl"
    digits = "9" * 5000
    file.write_text(f'{{"a": {digits}, "b": -Infinity, "c": 12, "d": 1e999}}\n')
    infinite = float("inf")
    assert values(file) == [{"a": digits, "b": -infinite, "c": 12, "d": infinite}]


DEEP = '{"a": ' + "[" * 300 + "]" * 300 + "}"
DEEPER = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
ODD = {
    '{"a": {"b": 1, "b": 2}}': ("duplicate_key", "the key 'b' occurs twice"),
    '{"a": "\\ud83d"}': ("not_unicode", "\\ud83d is half a character"),
    DEEP: ("too_deep", "more than 200 levels"),
    DEEPER: ("too_deep", "more than 200 levels"),
    "[1, 2]": ("not_an_object", "a row is a JSON object, this is a list"),
    "null": ("not_an_object", "a row is a JSON object, this is null"),
    "12": ("not_an_object", "a row is a JSON object, this is a number"),
}


@pytest.mark.parametrize("odd", ODD, ids=[str(index) for index in range(len(ODD))])
@pytest.mark.parametrize("layout", ["lines", "list", "objects"])
def test_one_odd_row_is_a_fault_of_that_row(tmp_path, odd, layout):
    good = json.dumps(ROWS[0], indent=1 if layout == "objects" else None)
    file = tmp_path / ("d.json" if layout == "list" else "d.jsonl")
    rows = [good, odd, good]
    file.write_text(f"[{','.join(rows)}]" if layout == "list" else "\n".join(rows))
    first, faulty, last = read_rows(file)
    assert first.value == last.value == ROWS[0]
    assert (first.fault, last.fault) == (None, None)
    reason, detail = ODD[odd]
    assert (faulty.value, faulty.fault.reason) == ({}, reason)
    assert detail in faulty.fault.detail
    assert count_rows(file) == 3
    with pytest.raises(FPOError, match=r"(line|row) \d+: "):
        list(read_sound_rows(file))


def test_what_looks_odd_and_is_sound(tmp_path):
    file = tmp_path / "d.jsonl"
    brackets = [{"a": "[{" * 500 + '"\\'}, {"a": "\\ud83d", "b": "😀"}, {"a": [[]] * 300}]
    file.write_text("".join(json.dumps(row) + "\n" for row in brackets))
    assert values(file) == brackets


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


class Dribble(io.BytesIO):
    """A stream that gives a few bytes at a time, so that every cut occurs."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(7 if size is None or size < 0 else min(size, 7))


@given(
    st.lists(st.dictionaries(st.text(), json_values, max_size=3), max_size=5),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_values_are_read_across_every_cut(rows, indent, ascii_only):
    parts = [json.dumps(row, indent=indent, ensure_ascii=ascii_only) for row in rows]
    data = "\n \n".join(parts)
    text, parser, found = JsonText(Dribble(data.encode()), "d"), JsonParser(), []
    while text.next_char():
        found.append((text.line, text.row(parser, "d").value))
    lines = [1 + sum(part.count("\n") + 2 for part in parts[:index]) for index in range(len(parts))]
    assert found == list(zip(lines, rows, strict=True))


def test_lines_and_columns_are_those_of_the_file(tmp_path):
    file = tmp_path / "d.json"
    big = json.dumps([{"a": "x" * 1000, "n": number} for number in range(1000)], indent=1)
    cut = big[: big.index('"n": 700')] + "?" + big[big.index('"n": 700') :]
    file.write_text(cut)
    line = cut[: cut.index("?")].count("\n") + 1
    with pytest.raises(FPOError, match=rf"d\.json, line {line}: not JSON \(.*, column 3\)"):
        list(read_rows(file))
    (tmp_path / "e.json").write_text('[{"a": 1}, {"a": 2} {"a": 3}]')
    with pytest.raises(FPOError, match=r"line 1: not JSON \(Expecting ',' or '\]', column 21\)"):
        list(read_rows(tmp_path / "e.json"))


FAULTS = {
    "syntax": ("d.jsonl", LINE + "{oops\n", r"line 2: not JSON \(.*column 2\)"),
    "cut off": ("d.jsonl", LINE + LINE[:20], r"line 2: not JSON"),
    "list": ("d.json", '[{"a": 1},\n {]', r"d\.json, line 2: not JSON"),
    "open list": ("d.json", '[{"a": 1}', r"line 1: not JSON \(Expecting"),
    "two lists": ("d.json", "[{}] [{}]", r"not JSON \(Extra data"),
    "open object": ("d.jsonl", '{\n "a": 1,\n', r"line 3: not JSON"),
    "nothing": ("d.jsonl", "", r"d\.jsonl' is empty"),
    "blank": ("d.jsonl", " \n\n", r"d\.jsonl' holds no rows"),
    "no rows": ("d.json", "[]", r"d\.json' holds no rows"),
    "only a header": ("d.csv", "a,b\n", r"d\.csv' holds no rows"),
    "unknown": ("d.xyz", "once upon a time", r"unknown kind; use \.jsonl"),
    "lfs": ("d.jsonl", "version https://git-lfs.github.com/spec/v1\noid", r"`git lfs pull`"),
    "lfs parquet": (
        "d.parquet",
        "version https://git-lfs.github.com/spec/v1\n",
        r"git-lfs pointer",
    ),
    "web page": ("d.json", "<!DOCTYPE html><html>", r"is a web page"),
    "splits": (
        "d.json",
        '{"train": [{"a": 1}], "test": [{"a": 2}]}',
        r"'train', 'test'\. Expected",
    ),
    "pandas": ("d.json", '{"prompt": {"0": "a"}, "chosen": {"0": "b"}}', r'orient="records"'),
    "utf-16": ("d.jsonl", LINE.encode("utf-16"), r"line 1: not UTF-8 text \(it is UTF-16\).*iconv"),
    "utf-16 bare": ("d.csv", "a,b\n".encode("utf-16-le"), r"it is UTF-16LE"),
    "latin-1": ("d.jsonl", LINE.encode() + b'{"a": "\xe9"}', r"line 2: not UTF-8 text \(byte 0xe9"),
    "latin-1 list": ("d.json", b'[{"a": 1},\n\n{"a": "\xe9"}]', r"line 3: not UTF-8 text"),
    "latin-1 csv": ("d.csv", b'a,b\n"1\n2",x\n\xe9,c\n', r"line 4: not UTF-8 text"),
    "csv quotes": ("d.csv", 'a,b\n"x"y,z\n', r"line 2: not CSV"),
    "csv open quote": ("d.csv", 'a,b\nc,d\n"x,y\n', r"line 3: not CSV"),
    "csv columns": ("d.csv", "a,b,a\n1,2,3\n", r"two columns are named 'a'"),
    "csv semicolons": ("d.csv", "a;b\n1;2\n", r"separated by ';', expected ','"),
    "csv tabs": ("d.csv", "a\tb\n1\t2\n", r"or name it \.tsv"),
    "csv without header": ("d.csv", f"{'word ' * 30},b\n", r"is no name of a column"),
    "damaged gzip": ("d.jsonl.gz", gzip.compress(LINE.encode())[:-9], r"gzip data is damaged"),
    "zst cut off": (
        "d.jsonl.zst",
        pa.compress(LINE.encode() * 9, "zstd", asbytes=True)[:-9],
        r"zstd data is",
    ),
    "parquet": ("d.parquet", b"PAR1 not", r"not a readable Parquet file"),
    "arrow": ("d.arrow", b"ARROW1 not", r"not a readable Arrow file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_by_file_and_line(tmp_path, fault):
    name, content, message = FAULTS[fault]
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FPOError, match=message) as told:
        list(read_rows(tmp_path / name))
    assert str(tmp_path / name) in str(told.value)
    assert len(str(told.value).split(". ")) <= 3


def test_the_conversion_that_an_error_names_makes_the_file_readable(tmp_path):
    iconv = shutil.which("iconv")
    if iconv is None:
        pytest.skip("no iconv")
    for encoding in ("utf-16", "utf-16-le", "utf-32", "cp1252"):
        old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
        old.write_bytes('{"prompt": "Café?"}\n'.encode(encoding))
        with pytest.raises(FPOError) as told:
            list(read_rows(old))
        command = str(told.value).split("`")[1].replace("OLD", str(old)).replace("> NEW", "")
        new.write_bytes(subprocess.check_output(command.split()))
        assert values(new) == [{"prompt": "Café?"}]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=20)


@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5), st.booleans())
def test_csv_is_read_as_the_csv_module_writes_it(tmp_path_factory, rows, tabs):
    file = tmp_path_factory.mktemp("csv") / ("d.tsv" if tabs else "d.csv")
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
        writer.writerows([["a", "b", "c"], *rows])
    assert values(file) == [dict(zip("abc", row, strict=True)) for row in rows]


def test_a_csv_row_of_another_length_is_one_odd_row(tmp_path):
    (tmp_path / "d.csv").write_text('a,b\n1,2\n\n"x\ny",3,4\n5,6\n')
    rows = list(read_rows(tmp_path / "d.csv"))
    assert [row.where.rpartition(", ")[2] for row in rows] == ["line 2", "line 3", "line 6"]
    assert rows[1].fault == ("wrong_fields", "3 values, expected 2 as in the first line")
    assert [row.value for row in rows if not row.fault] == [
        {"a": "1", "b": "2"},
        {"a": "5", "b": "6"},
    ]


def test_long_texts_in_csv(tmp_path):
    text = "word " * 100_000
    (tmp_path / "d.csv").write_text(f'a,b\n"{text}",1\n')
    assert values(tmp_path / "d.csv") == [{"a": text, "b": "1"}]


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "loop")
    (tmp_path / "loop").symlink_to(tmp_path / "d.jsonl")
    with pytest.raises(FPOError, match="does not exist|cannot be read"):
        list(read_rows(tmp_path / "d.jsonl"))
    with pytest.raises(FPOError, match=r"nothing\.jsonl' does not exist; a relative path starts"):
        list(read_rows(tmp_path / "nothing.jsonl"))


def test_the_identity_of_a_file_is_its_digest_whatever_its_name(tmp_path):
    import hashlib

    file = write(tmp_path / "d.jsonl", ROWS)
    value = f"file:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert identify_data(str(file)) == (value, True, None)
    file.rename(tmp_path / "e.txt")
    assert identify_data(str(tmp_path / "e.txt")).value == value


READ = {
    "KIND.JSONL": 1,
    "kind.txt": 1,
    "noext": 1,
    "kind.csv": 1,
    "kind.jsonl.gz": 1,
    "lines.json": 2,
    "pretty.jsonl": 1,
    "bom.jsonl": 1,
    "bom.json": 1,
    "crlf.jsonl": 2,
    "ls_u2028.jsonl": 1,
    "control.jsonl": 1,
    "nul.jsonl": 1,
    "nan.jsonl": 1,
    "big_int.jsonl": 1,
    "many": 2,
    "saved": 1,
    "pq_dict.parquet": 1,
    "pq_large.parquet": 1,
    "pq_view.parquet": 1,
    "pq_map.parquet": 1,
    "pq_binary.parquet": 1,
    "pq_uf.parquet": 1,
    "pq_tool_calls_null.parquet": 1,
}
ODD_CASES = {
    "dupkey.jsonl": "duplicate_key",
    "surrogate.jsonl": "not_unicode",
    "pq_bad_utf8.parquet": "not_unicode",
    "deep.jsonl": "too_deep",
}
REFUSED = {
    "utf16.jsonl": "UTF-16",
    "latin1.jsonl": "line 1: not UTF-8",
    "lfs.jsonl": "git lfs pull",
    "lfs.parquet": "git lfs pull",
    "split_dict.json": "'train', 'test'",
    "pq_dup_column.parquet": "'chosen'",
    "pq_truncated.parquet": "not a readable Parquet file",
    "pq_corrupt_page.parquet": "row group 1: not a readable",
    "whitespace_only.jsonl": "no rows",
}


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
def test_the_cases_that_failed():
    for name, count in READ.items():
        rows = list(read_rows(CASES / name))
        assert len(rows) == count_rows(CASES / name) == count, name
        assert not any(row.fault for row in rows), name
        assert rows[0].value["chosen"], name
    for name, reason in ODD_CASES.items():
        assert [row.fault.reason for row in read_rows(CASES / name)] == [reason]
    for name, message in REFUSED.items():
        with pytest.raises(FPOError, match=message):
            list(read_rows(CASES / name))
