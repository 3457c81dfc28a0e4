"""What the tables do not answer at once: where a pair is, and where a feature fires.

The tables are in the order of the pairs. Two indexes, made once for an artifact below ``FPO_CACHE``
and mapped into memory, turn them round: that of the pairs is small and quick to make, that of the
features holds every stored activation of ``pooled`` and takes a reading of it:

    <FPO_CACHE>/index/<version>/pairs-1/shards.npy      [S + 1] int64, first row of each shard
                                        lengths.npy     [R] int32, scored tokens of each row
                                        pairs.npy       [P] uint64, pair ids as numbers, ascending
                                        places.npy      [P] uint32, number of each of these pairs
    <FPO_CACHE>/index/<version>/features-1/offsets.npy  [F + 1] int64, where a feature begins
                                           rows         [M] uint32, row of ``pooled``: 2i chosen,
                                                        2i + 1 rejected
                                           values       [M] float32, mean activation there
"""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from explorer.cache import FeatureCache
from explorer.errors import NotThere
from fpo_core.lists import lists_of
from fpo_core.progress import Progress
from storage.artifact import Artifact
from storage.cache import cache_folder
from storage.locks import file_lock

PAIRS, FEATURES = "pairs-1", "features-1"  # raised with the format
READERS = 8  # shards whose small columns are read at a time
ENTRIES_AT_A_TIME = 8 << 20  # of the index of features, in memory while it is made


class Entries(NamedTuple):
    """Where one feature is stored: M rows of ``pooled``, ascending, and its means there."""

    rows: np.ndarray
    values: np.ndarray


class PairIndex:
    """Where pairs are, and how long their responses.

    Args:
        folder: of the finished index.
    """

    def __init__(self, folder: Path) -> None:
        self.shards, self.lengths, self.pairs, self.places = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("shards", "lengths", "pairs", "places")
        )

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

    def pair_id(self, number: int) -> str:
        """The pair of a number, which ``pair_number`` takes."""
        return f"{int(self.pairs[np.flatnonzero(self.places == number)[0]]):016x}"

    def shard_of(self, row: int) -> tuple[int, int]:
        """The shard that a row of ``pooled`` is in, and its place there."""
        shard = int(np.searchsorted(self.shards, row, side="right")) - 1
        return shard, row - int(self.shards[shard])

    def token_rows(self, row: int) -> slice:
        """The rows of the shard's token table that are of a response, where all tokens have one."""
        shard, _ = self.shard_of(row)
        first = int(self.lengths[int(self.shards[shard]) : row].sum())
        return slice(first, first + int(self.lengths[row]))


class FeatureIndex:
    """Where features are stored.

    Args:
        folder: of the finished index.
    """

    def __init__(self, folder: Path) -> None:
        self.offsets = np.load(folder / "offsets.npy")
        self._rows, self._values = (
            np.memmap(folder / name, kind, "r") if self.offsets[-1] else np.empty(0, kind)
            for name, kind in (("rows", np.uint32), ("values", np.float32))
        )

    def entries(self, feature: int) -> Entries:
        """Where a feature is stored."""
        part = slice(int(self.offsets[feature]), int(self.offsets[feature + 1]))
        return Entries(self._rows[part], self._values[part])


def open_pair_index(cache: FeatureCache) -> PairIndex:
    """The index of the pairs; made now where it is not there, by one process at a time."""
    return PairIndex(_made(cache, PAIRS, _make_pairs))


def open_feature_index(cache: FeatureCache) -> FeatureIndex:
    """The index of the features; made now where it is not there, by one process at a time."""
    return FeatureIndex(_made(cache, FEATURES, _make_features))


def _made(cache: FeatureCache, name: str, make: Callable[[FeatureCache, Path], None]) -> Path:
    folder = cache_folder() / "index" / cache.artifact.version / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_suffix(".lock"), lambda: None):
            if not folder.is_dir():
                making = folder.with_suffix(".making")
                shutil.rmtree(making, ignore_errors=True)
                making.mkdir()
                make(cache, making)
                making.rename(folder)
    return folder


def _make_pairs(cache: FeatureCache, folder: Path) -> None:
    """From two columns of ``pooled``."""
    ids, lengths = [], []
    shards = range(cache.artifact.num_shards("pooled"))
    with _progress("index of pairs", len(shards)) as progress:
        for table in table_columns(cache.artifact, "pooled", ["pair_id", "n_tokens"]):
            ids.append(np.array([int(one, 16) for one in table["pair_id"].to_pylist()[::2]], "u8"))
            lengths.append(table["n_tokens"].to_numpy().astype(np.int32))
            progress.advance(1)
    numbers = np.concatenate(ids)
    order = np.argsort(numbers).astype(np.uint32)
    first_rows = np.concatenate([[0], np.cumsum([len(one) for one in lengths])])
    np.save(folder / "shards.npy", first_rows)
    np.save(folder / "lengths.npy", np.concatenate(lengths))
    np.save(folder / "places.npy", order)
    np.save(folder / "pairs.npy", numbers[order])


def _make_features(cache: FeatureCache, folder: Path) -> None:
    """In one reading of ``pooled``; memory does not follow the data.

    How often each feature is stored is known from the shards' statistics, so each has its place,
    and what was read of some shards is sorted by feature and written there.
    """
    offsets = np.concatenate([[0], np.cumsum(_times_stored(cache))])
    cursor = offsets[:-1].copy()
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb")) for name in ("rows", "values")]
        for features, rows, values in _blocks(cache):
            order = np.argsort(features, kind="stable")  # a feature's rows stay ascending
            counts = np.bincount(features, minlength=len(cursor))
            for file, sorted_values in zip(files, (rows[order], values[order]), strict=True):
                _write(file.fileno(), sorted_values, counts, cursor)
            cursor += counts
    assert np.array_equal(cursor, offsets[1:]), "shard_stats and pooled disagree"
    np.save(folder / "offsets.npy", offsets)


def _write(file: int, values: np.ndarray, counts: np.ndarray, cursor: np.ndarray) -> None:
    """Each feature's values to where its next ones go."""
    view, size, begin = values.data.cast("B"), values.itemsize, 0
    for feature in np.flatnonzero(counts):
        end = begin + int(counts[feature]) * size
        os.pwrite(file, view[begin:end], int(cursor[feature]) * size)
        begin = end


def _times_stored(cache: FeatureCache) -> np.ndarray:
    """Responses where each feature's mean is stored, [F]."""
    counts = np.zeros(cache.sae.d_sae, dtype=np.int64)
    for table in table_columns(cache.artifact, "shard_stats", ["feature", "pooled_kept"]):
        counts[table["feature"].to_numpy()] += table["pooled_kept"].to_numpy()
    return counts


def table_columns(artifact: Artifact, table: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield small columns of a table's shards, in order; read some at a time.

    No more are asked for in advance than the readers are soon done with: the program's end waits
    for what was.
    """
    asked = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for shard in range(artifact.num_shards(table)):
            asked.append(pool.submit(artifact.rows, table, shard, None, columns))
            if len(asked) == 2 * READERS:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()


def _blocks(cache: FeatureCache) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Feature, row and mean of what is stored, of as many shards as fit into a block."""
    # Of 16 bits they are sorted by radix, several times faster.
    kind = np.uint16 if cache.sae.d_sae <= 1 << 16 else np.uint32
    parts, size, first = [], 0, 0
    for table in _shards(cache):
        indices, means = lists_of(table, "indices"), lists_of(table, "values")
        rows = np.arange(first, first + table.num_rows, dtype=np.uint32)
        parts.append((indices.values.astype(kind), np.repeat(rows, indices.lengths), means.values))
        first, size = first + table.num_rows, size + len(means.values)
        if size >= ENTRIES_AT_A_TIME:
            yield _joined(parts)
            parts, size = [], 0
    if parts:
        yield _joined(parts)


def _joined(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features, rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return features, rows, values


def _shards(cache: FeatureCache) -> Iterator[pa.Table]:
    artifact = cache.artifact
    count = artifact.num_shards("pooled")
    with _progress("index of features", count) as progress:
        for shard in range(count):
            yield artifact.rows("pooled", shard, None, ["indices", "values"])
            progress.advance(1)


def _progress(label: str, shards: int) -> Progress:
    return Progress(label, total=shards, unit="shard")
