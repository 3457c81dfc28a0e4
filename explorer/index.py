"""The pooled table turned round: by feature, the responses where it is stored, and their means.

The tables are in the order of the pairs; "where does this feature fire" would read all of them.
The index is files of flat arrays, made once for an artifact below ``FPO_CACHE`` and mapped into
memory, so that a feature's entries are one slice:

    <FPO_CACHE>/index/<version>/offsets.npy   [F + 1] int64, where a feature's entries begin
                                rows.npy      [M] uint32, row of ``pooled``: 2i chosen, 2i + 1 not
                                values.npy    [M] float32, mean activation there
                                shards.npy    [S + 1] int64, first row of each shard
                                lengths.npy   [R] int32, scored tokens of each row
                                pairs.npy     [P] uint64, pair ids as numbers, ascending
                                places.npy    [P] uint32, number of each of these pairs
"""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from explorer.cache import FeatureCache
from explorer.errors import NotThere
from fpo_core.lists import lists_of
from fpo_core.progress import Progress
from storage.cache import cache_folder
from storage.locks import file_lock

ARRAYS = ("offsets", "rows", "values", "shards", "lengths", "pairs", "places")
FORMAT = 1
COLUMNS = ["pair_id", "n_tokens", "indices", "values"]


class Entries(NamedTuple):
    """Where one feature is stored: M rows of ``pooled``, ascending, and its means there."""

    rows: np.ndarray
    values: np.ndarray


class FeatureIndex:
    """The arrays of a cache's index, mapped into memory.

    Args:
        folder: of the finished index.
    """

    def __init__(self, folder: Path) -> None:
        for name in ARRAYS:
            setattr(self, name, np.load(folder / f"{name}.npy", mmap_mode="r"))
        self.offsets: np.ndarray
        self.rows: np.ndarray
        self.values: np.ndarray
        self.shards: np.ndarray
        self.lengths: np.ndarray
        self.pairs: np.ndarray
        self.places: np.ndarray

    def entries(self, feature: int) -> Entries:
        """Where a feature is stored."""
        part = slice(int(self.offsets[feature]), int(self.offsets[feature + 1]))
        return Entries(self.rows[part], self.values[part])

    def pair_number(self, pair_id: str) -> int:
        """The number of a pair in the order of the tables.

        Raises:
            NotThere: there is no such pair.
        """
        with suppress(ValueError, OverflowError):  # no 16 hex digits
            wanted = np.uint64(int(pair_id, 16))
            place = int(np.searchsorted(self.pairs, wanted))
            if place < len(self.pairs) and self.pairs[place] == wanted:
                return int(self.places[place])
        raise NotThere(f"no pair {pair_id[:40]!r} in this cache; `fpo cache pairs` lists them")

    def shard_of(self, row: int) -> tuple[int, int]:
        """The shard that a row of ``pooled`` is in, and its place there."""
        shard = int(np.searchsorted(self.shards, row, side="right")) - 1
        return shard, row - int(self.shards[shard])

    def token_rows(self, row: int) -> slice:
        """The rows of the shard's token table that are of a response, where all tokens have one."""
        shard, _ = self.shard_of(row)
        first = int(self.lengths[int(self.shards[shard]) : row].sum())
        return slice(first, first + int(self.lengths[row]))


def index_folder(cache: FeatureCache) -> Path:
    """Where a cache's index is kept."""
    return cache_folder() / "index" / f"{cache.artifact.version}-{FORMAT}"


def has_index(cache: FeatureCache) -> bool:
    """Whether the index is made."""
    return (index_folder(cache) / "offsets.npy").is_file()


def open_index(cache: FeatureCache) -> FeatureIndex:
    """The index of a cache; made now where it is not there, by one process at a time."""
    folder = index_folder(cache)
    if not has_index(cache):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_suffix(".lock"), lambda: None):
            if not has_index(cache):
                _make(cache, folder)
    return FeatureIndex(folder)


def _make(cache: FeatureCache, folder: Path) -> None:
    making = folder.with_suffix(".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    counts, shards, lengths, pairs = _count(cache)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    arrays = {
        "shards": np.concatenate([[0], np.cumsum(shards)]), "lengths": np.concatenate(lengths),
    }  # fmt: skip
    numbers = np.concatenate(pairs)
    arrays["places"] = np.argsort(numbers).astype(np.uint32)
    arrays["pairs"] = numbers[arrays["places"]]
    for name, array in arrays.items():
        np.save(making / f"{name}.npy", array)
    _fill(cache, making, offsets)
    np.save(making / "offsets.npy", offsets)  # last: with it the index counts as there
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def _count(
    cache: FeatureCache,
) -> tuple[np.ndarray, list[int], list[np.ndarray], list[np.ndarray]]:
    """Entries of each feature; rows of each shard; lengths of rows; ids of pairs as numbers."""
    counts = np.zeros(cache.sae.d_sae, dtype=np.int64)
    shards, lengths, pairs = [], [], []
    for table in _shards(cache, "counting a feature's responses"):
        indices = lists_of(table, "indices").values
        counts += np.bincount(indices, minlength=len(counts))
        shards.append(table.num_rows)
        lengths.append(table["n_tokens"].to_numpy().astype(np.int32))
        ids = table["pair_id"].to_pylist()[::2]
        pairs.append(np.array([int(one, 16) for one in ids], dtype=np.uint64))
    return counts, shards, lengths, pairs


def _fill(cache: FeatureCache, folder: Path, offsets: np.ndarray) -> None:
    """Write each shard's entries to their features' places; memory does not follow the data."""
    total, cursor, first = int(offsets[-1]), offsets[:-1].copy(), 0
    rows, values = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, (total,))
        for name, kind in (("rows", np.uint32), ("values", np.float32))
    )
    for table in _shards(cache, "index of features"):
        indices, means = lists_of(table, "indices"), lists_of(table, "values")
        row = first + np.repeat(np.arange(table.num_rows), indices.lengths)
        order = np.argsort(indices.values, kind="stable")  # a feature's rows stay ascending
        features = indices.values[order].astype(np.int64)
        present, starts, counts = np.unique(features, return_index=True, return_counts=True)
        rank = np.arange(len(features)) - np.repeat(starts, counts)
        places = cursor[features] + rank
        rows[places], values[places] = row[order], means.values[order]
        cursor[present] += counts
        first += table.num_rows
    rows.flush()
    values.flush()


def _shards(cache: FeatureCache, label: str) -> Iterator:
    artifact = cache.artifact
    count = artifact.num_shards("pooled")
    with Progress(label, total=count, unit="shard") as progress:
        for shard in range(count):
            yield pq.read_table(artifact.shard_path(shard, "pooled"), columns=COLUMNS)
            progress.advance(1)
