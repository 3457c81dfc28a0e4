"""Which encodings, compression and row groups the Parquet shards should have.

    python -m benchmarks.parquet

Rows like those of ``features/tokens`` and ``features/pooled``, in shards of 512 pairs as a recipe's
defaults give them: popularity of the features, values, lengths and repeats follow the quickstart's
own features. Every candidate differs from the first in what its name says. Each round measures all
of them once, in another order, and looks for another pair; the table has medians over the rounds.
The files are in the page cache: the times are costs of decoding, and what a pair's scan would fetch
from S3 has a column of its own. The row in bold is what ``storage.parquet`` writes: its bytes are
compared.
"""

import argparse
import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.parquet_rows import PAIRS_PER_SHARD, pooled_shards, token_shards
from storage.parquet import parquet_bytes

FEATURE_RANK = 100  # the feature looked for: on about 3 % of the tokens
IDS, VALUES = "indices.list.element", "values.list.element"
FLOATS = {VALUES, "mass", "cutoff"}


class Candidate(NamedTuple):
    """One way to write a table."""

    name: str
    changes: dict[str, Any]  # of BASE
    ids: str = "dictionary"
    values: str = "BYTE_STREAM_SPLIT"


BASE = {"compression": "zstd", "compression_level": 3, "write_page_index": True}
BLOOM = {"bloom_filter_options": {"pair_id": {"ndv": PAIRS_PER_SHARD, "fpp": 0.01}}}
ENCODINGS = (
    Candidate("zstd 3, dictionary ids, split values", {}),
    Candidate("zstd 1", {"compression_level": 1}),
    Candidate("zstd 9", {"compression_level": 9}),
    Candidate("snappy", {"compression": "snappy", "compression_level": None}),
    Candidate("plain ids", {}, ids="PLAIN"),
    Candidate("delta ids", {}, ids="DELTA_BINARY_PACKED"),
    Candidate("split ids", {}, ids="BYTE_STREAM_SPLIT"),
    Candidate("plain values", {}, values="PLAIN"),
    Candidate("no page index", {"write_page_index": False}),
    Candidate("bloom filter on pair_id", BLOOM),
)
TOKENS = (
    *ENCODINGS,
    Candidate("row groups of 4,096", {"row_group_size": 4096}),
    Candidate("row groups of 16,384", {"row_group_size": 16384}),
    Candidate("row groups of 32,768", {"row_group_size": 32768}),
    Candidate("row groups of 65,536", {"row_group_size": 65536}),
    Candidate("row groups of 16,384, bloom filter", {"row_group_size": 16384, **BLOOM}),
    Candidate("pages of 1,000 rows", {"max_rows_per_page": 1000}),
)
# A shard has 1,024 rows: no larger row group exists.
POOLED = (*ENCODINGS, Candidate("row groups of 256", {"row_group_size": 256}))


class Column(NamedTuple):
    """One column of the table."""

    key: str
    title: str
    digits: int


COLUMNS = (
    Column("bytes", "B a row", 1),
    Column("write", "write MB/s", 0),
    Column("read", "read MB/s", 0),
    Column("feature polars", "a feature: polars ms", 0),
    Column("feature pyarrow", "pyarrow", 0),
    Column("pair polars", "a pair: polars ms", 1),
    Column("pair pyarrow", "pyarrow", 1),
    Column("pair duckdb", "duckdb", 1),
    Column("kept", "min/max leave %", 0),
    Column("fetched", "MB to fetch", 1),
    Column("columns polars", "two columns: polars ms", 1),
    Column("columns pyarrow", "pyarrow", 1),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a name: the first candidate and these")
    options = parser.parse_args(arguments)
    print("| | " + " | ".join(column.title for column in COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    spread: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shards, candidates in (
            ("features/tokens", token_shards(2), TOKENS),
            ("features/pooled", pooled_shards(20), POOLED),
        ):
            first, *others = candidates
            wanted = [first, *(other for other in others if options.only in other.name)]
            bench = Bench(Path(folder) / name, shards, wanted)
            for number in range(options.rounds):
                bench.round(number)
            print(bench.rows(name), flush=True)
            spread += bench.spread()
    print(
        f"\nHalf of all cells varied by less than {statistics.median(spread):.0%} between their "
        f"quartiles, 90 % by less than {np.quantile(spread, 0.9):.0%}; {options.rounds} rounds."
    )


class Bench:
    """One table, all its candidates.

    Args:
        folder: where the files go.
        shards: the table.
        candidates: how to write it.
    """

    def __init__(
        self, folder: Path, shards: list[pa.Table], candidates: Sequence[Candidate]
    ) -> None:
        self.folder = folder
        self.shards = shards
        self.candidates = candidates
        self.num_rows = sum(shard.num_rows for shard in shards)
        self.megabytes = sum(shard.nbytes for shard in shards) / 1e6
        self.pair_ids = [pair for shard in shards for pair in shard["pair_id"].unique().to_pylist()]
        self.measured: dict[str, dict[str, list[float]]] = {}
        self.chosen: set[str] = set()
        for number, candidate in enumerate(candidates):
            self._write(number, candidate)

    def _write(self, number: int, candidate: Candidate) -> None:
        folder = self._path(number)
        folder.mkdir(parents=True)
        for shard, table in enumerate(self.shards):
            (folder / f"{shard:05d}.parquet").write_bytes(encode(table, candidate))
        if (folder / "00000.parquet").read_bytes() == parquet_bytes(self.shards[0]):
            self.chosen.add(candidate.name)
        size = sum(file.stat().st_size for file in folder.iterdir())
        self.measured[candidate.name] = {
            "bytes": [size / self.num_rows],
            **pruning(folder, self.pair_ids[::10]),
        }

    def _path(self, number: int) -> Path:
        return self.folder / str(number)

    def round(self, number: int) -> None:
        """Measure every candidate once."""
        order = np.random.default_rng(number).permutation(len(self.candidates))
        pair = self.pair_ids[(number * 397 + 5) % len(self.pair_ids)]
        for index in order.tolist():
            self._measure(index, pair)

    def _measure(self, number: int, pair: str) -> None:
        candidate, folder = self.candidates[number], self._path(number)
        found = self.measured[candidate.name]
        shards = self.shards[: len(self.shards) // 2]
        taken, _ = timed(lambda: [encode(shard, candidate) for shard in shards])
        found.setdefault("write", []).append(sum(shard.nbytes for shard in shards) / 1e6 / taken)
        taken, _ = timed(lambda: ds.dataset(folder).to_table())
        found.setdefault("read", []).append(self.megabytes / taken)
        counts: dict[str, set[int]] = {}
        for name, scan in SCANS.items():
            taken, rows = timed(partial(scan, folder, pair))
            found.setdefault(name, []).append(math.nan if rows is None else 1000 * taken)
            counts.setdefault(name.partition(" ")[0], set()).update([rows] if rows else [])
        assert all(len(agreed) == 1 for agreed in counts.values()), counts

    def rows(self, table: str) -> str:
        """The table's lines for these candidates."""
        lines = [f"| *`{table}`, {self.num_rows:,} rows* |" + " |" * len(COLUMNS)]
        for candidate in self.candidates:
            found = self.measured[candidate.name]
            cells = [cell(statistics.median(found[c.key]), c.digits) for c in COLUMNS]
            bold = "**" if candidate.name in self.chosen else ""
            lines.append(
                "| " + " | ".join(f"{bold}{c}{bold}" for c in (candidate.name, *cells)) + " |"
            )
        return "\n".join(lines)

    def spread(self) -> list[float]:
        """Distance of the quartiles as a share of the median, for every time that was taken."""
        return [
            float(np.subtract(*np.quantile(values, [0.75, 0.25])) / statistics.median(values))
            for found in self.measured.values()
            for key, values in found.items()
            if key not in {"bytes", "kept", "fetched"} and not math.isnan(values[0])
        ]


def cell(value: float, digits: int) -> str:
    """A median as text."""
    return "cannot read" if math.isnan(value) else f"{value:,.{digits}f}"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def encode(table: pa.Table, candidate: Candidate) -> bytes:
    """A table as this candidate writes it."""
    split = {name for name in FLOATS if name != VALUES}
    plain: dict[str, str] = {}
    for path, encoding in ((IDS, candidate.ids), (VALUES, candidate.values)):
        if encoding == "BYTE_STREAM_SPLIT":
            split.add(path)
        elif encoding != "dictionary":
            plain[path] = encoding
    leaves = {pq_path(field) for field in table.schema}
    dictionary: Any = sorted(leaves - split - set(plain))
    sink = io.BytesIO()
    pq.write_table(
        table, sink, **{**BASE, **candidate.changes},
        use_dictionary=dictionary,
        use_byte_stream_split=False,
        column_encoding={**plain, **dict.fromkeys(split & leaves, "BYTE_STREAM_SPLIT")},
    )  # fmt: skip
    return sink.getvalue()


def pq_path(field: pa.Field) -> str:
    """A column's path as Parquet names it."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


# -- the scans, each as a user would write it; they return how many rows were found --


def feature_polars(folder: Path, _pair: str) -> int:
    """All rows of one feature."""
    rows = pl.scan_parquet(folder / "*.parquet").select("pair_id", "side", "indices", "values")
    return rows.explode("indices", "values").filter(indices=FEATURE_RANK).collect().height


def feature_pyarrow(folder: Path, _pair: str) -> int:
    """All rows of one feature."""
    found = 0
    columns = ["pair_id", "side", "indices", "values"]
    for batch in ds.dataset(folder).to_batches(columns=columns):
        indices = batch["indices"]
        hit = pc.call_function("equal", [indices.flatten(), FEATURE_RANK])
        rows = batch.select(["pair_id", "side"]).take(indices.value_parent_indices().filter(hit))
        values = batch["values"].flatten().filter(hit)
        found += pa.table([*rows.columns, values], ["pair_id", "side", "value"]).num_rows
    return found


def pair_polars(folder: Path, pair: str) -> int:
    """All rows of one pair."""
    return pl.scan_parquet(folder / "*.parquet").filter(pair_id=pair).collect().height


def pair_pyarrow(folder: Path, pair: str) -> int:
    """All rows of one pair."""
    return ds.dataset(folder).to_table(filter=ds.field("pair_id") == pair).num_rows


def pair_duckdb(folder: Path, pair: str) -> int | None:
    """All rows of one pair. DuckDB looks at bloom filters, and refuses some encodings."""
    query = "select * from read_parquet(?) where pair_id = ?"
    try:
        return len(duckdb.execute(query, [f"{folder}/*.parquet", pair]).to_arrow_table())
    except duckdb.Error:
        return None


def columns_polars(folder: Path, _pair: str) -> int:
    """Two small columns of all rows."""
    return pl.scan_parquet(folder / "*.parquet").select("pair_id", "side").collect().height


def columns_pyarrow(folder: Path, _pair: str) -> int:
    """Two small columns of all rows."""
    return ds.dataset(folder).to_table(columns=["pair_id", "side"]).num_rows


SCANS: dict[str, Callable[[Path, str], int | None]] = {
    "feature polars": feature_polars,
    "feature pyarrow": feature_pyarrow,
    "pair polars": pair_polars,
    "pair pyarrow": pair_pyarrow,
    "pair duckdb": pair_duckdb,
    "columns polars": columns_polars,
    "columns pyarrow": columns_pyarrow,
}


def pruning(folder: Path, pairs: Sequence[str]) -> dict[str, list[float]]:
    """What statistics and a lazy reader spare, mean over the pairs.

    ``kept``: the percentage of the bytes in row groups whose smallest and largest pair id let the
    pair in. ``fetched``: MB of the row groups that hold the pair, and of the others' ``pair_id``:
    what a reader has to fetch that looks at the filter's column first, as DuckDB does.
    """
    kept, fetched = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    total = 0
    for path in folder.iterdir():
        file = pq.ParquetFile(path)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            first = group.column(0)
            size = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            inside = set(file.read_row_group(number, ["pair_id"])["pair_id"].unique().to_pylist())
            total += size
            for pair in pairs:
                kept[pair] += size * (first.statistics.min <= pair <= first.statistics.max)
                fetched[pair] += size if pair in inside else first.total_compressed_size
    return {
        "kept": [100 * statistics.mean(kept.values()) / total],
        "fetched": [statistics.mean(fetched.values()) / 1e6],
    }


if __name__ == "__main__":
    main()
