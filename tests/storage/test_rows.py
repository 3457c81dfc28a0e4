"""Parts of an artifact's shards: only what is asked for, checked, from a folder and from S3."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import schemas
from storage.errors import ArtifactCorrupt, StoreError
from tests.storage.making import VERSION, made, make

COLUMNS = ["pair_id", "chosen_logp"]
FILE = f"artifacts/reference/{VERSION}/data/00001.parquet"


@pytest.fixture
def artifact(store, monkeypatch):
    monkeypatch.setattr("storage.parquet.ROW_GROUP_ROWS", 2)  # of three rows: two groups
    make(store)
    return store.artifact("reference", VERSION)


def test_rows_are_those_of_the_whole_table(artifact, place):
    whole = stored(place).select(COLUMNS)
    for start in range(3):
        for stop in range(start + 1, 4):
            part = artifact.rows("", 1, slice(start, stop), COLUMNS)
            assert part.equals(whole.slice(start, stop - start))
    assert artifact.rows("", 1, None, COLUMNS[:1]).equals(whole.select(COLUMNS[:1]))
    artifact.table(shard=1)  # which fetches an object to where it is read from then on
    assert place.open().artifact("reference", VERSION).rows("", 1, None, COLUMNS).equals(whole)


def test_a_file_from_before_page_checksums_is_verified_as_a_whole(
    store, place, tmp_path, monkeypatch
):
    monkeypatch.setattr("storage.parquet.CHECKED", b"not yet written")
    make(store)
    data = bytearray(place.read(FILE))
    whole = stored(place).select(COLUMNS)
    assert store.artifact("reference", VERSION).rows("", 1, slice(1, 3), COLUMNS).equals(whole[1:])
    group = pq.ParquetFile(pa.BufferReader(bytes(data))).metadata.row_group(0)
    others = [group.column(number) for number in range(group.num_columns)]
    (other,) = (one for one in others if one.path_in_schema == "rejected_logp")
    data[other.data_page_offset + other.total_compressed_size - 1] ^= 0x10
    place.write(FILE, bytes(data))
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "an empty cache"))
    with pytest.raises(ArtifactCorrupt, match=r"00001\.parquet: "):
        place.open().artifact("reference", VERSION).rows("", 1, slice(1, 3), COLUMNS)


def stored(place) -> pa.Table:
    return pq.read_table(pa.BufferReader(place.read(FILE)))


def test_a_missing_or_cut_file_is_told(artifact, place):
    data = place.read(FILE)
    place.write(FILE, data[:-1])
    with pytest.raises(ArtifactCorrupt, match=r"00001\.parquet: it has \d+ bytes, written were"):
        artifact.rows("", 1, slice(0, 1), COLUMNS)
    place.write(FILE, data[:9])
    with pytest.raises(ArtifactCorrupt, match=r"00001\.parquet: it .* written were"):
        artifact.rows("", 1, slice(0, 1), COLUMNS)
    place.remove(FILE)
    with pytest.raises(ArtifactCorrupt, match=r"00001\.parquet: it is missing"):
        artifact.rows("", 1, slice(0, 1), COLUMNS)


def test_a_byte_changed_in_a_column_is_told(artifact, place):
    """Any byte of a column, those of page headers included: the right rows, or the damage named."""
    whole, data = stored(place).select(COLUMNS), place.read(FILE)
    group = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    (column,) = (one for one in columns if one.path_in_schema == "chosen_logp")
    begin, size, told = column.data_page_offset, column.total_compressed_size, 0
    for position in range(begin, begin + size):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        place.write(FILE, bytes(damaged))
        found = place.open().artifact("reference", VERSION)
        try:
            assert found.rows("", 1, None, COLUMNS).equals(whole)
        except ArtifactCorrupt as error:
            told += "00001.parquet" in str(error)
    assert told > size / 2


def test_of_an_object_only_the_parts_are_fetched(artifact, place, tmp_path):
    if not place.url.startswith("s3:"):
        pytest.skip("a folder's files are opened where they are")
    artifact.rows("", 1, slice(0, 1), COLUMNS)
    assert not [*(tmp_path / "cache").glob("store-files/files/??/*")]
    artifact.table(shard=1)
    assert len([*(tmp_path / "cache").glob("store-files/files/??/*")]) == 1


def test_metadata_columns_are_written_and_found_by_the_footer_alone(store, place):
    metadata = {"topic": pa.string(), "score": pa.float64()}
    row = {name: [] if name.endswith(("ids", "unscored")) else "x" for name in schemas.PAIRS.names}
    rows = [{**row, "topic": "maths", "score": None}, {**row, "topic": None, "score": 0.5}]
    table = pa.Table.from_pylist(rows, schema=schemas.pairs_schema(metadata))
    with store.hold("pairs", VERSION, None) as hold:
        writer = store.writer("pairs", VERSION, hold)
        writer.put_shard(0, {"": table})
        with pytest.raises(StoreError, match="table has fields"):
            writer.put_shard(1, {"": table.append_column("other", pa.array(["a", "b"]))})
        writer.commit(made({}))
    artifact = place.open().artifact("pairs", VERSION)
    assert schemas.metadata_types(artifact.schema()) == metadata
    assert artifact.rows("", 0, None, ["topic", "score"]).to_pylist() == [
        {"topic": "maths", "score": None},
        {"topic": None, "score": 0.5},
    ]


def test_a_damaged_footer_is_told(artifact, place):
    data = bytearray(place.read(FILE.replace("00001", "00000")))
    data[-8:] = b"\0" * 8
    place.write(FILE.replace("00001", "00000"), bytes(data))
    with pytest.raises(ArtifactCorrupt, match=r"00000\.parquet"):
        artifact.schema()
