"""Columns of lists as two arrays: what Parquet stores, without a Python object a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Lists:
    """A column of lists: row i is values[offsets[i] : offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """One row's list."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Of each row."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Lists":
        """These rows, in this order."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        begins = np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Lists(self.values[begins + np.arange(offsets[-1])], offsets)

    def to_arrow(self) -> pa.Array:
        """As an Arrow column; the values are not copied."""
        item = pa.array(self.values)
        kind = pa.list_(pa.field("item", item.type, nullable=False))
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), item, type=kind)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where lists of these lengths begin, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)])


def lists_of(table: pa.Table, name: str) -> Lists:
    """A table's column of lists, without a copy where it is one chunk."""
    column: Any = table[name].combine_chunks()
    offsets = column.offsets.to_numpy()
    return Lists(column.flatten().to_numpy(), offsets - offsets[0])


def from_rows(rows: Sequence[np.ndarray], dtype: type) -> Lists:
    """Lists of arrays, one a row."""
    values = np.concatenate([np.empty(0, dtype), *rows])
    return Lists(values, offsets_of(np.array([len(row) for row in rows], dtype=np.int64)))


def concatenated(parts: Sequence[Lists], dtype: type) -> Lists:
    """Lists of several columns, one after the other."""
    values = np.concatenate([np.empty(0, dtype), *(part.values for part in parts)])
    lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in parts)])
    return Lists(values, offsets_of(lengths))
