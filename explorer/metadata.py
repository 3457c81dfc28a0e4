"""Pairs by their metadata: conditions such as ``topic=maths``, and features of the pairs they meet.

A condition is ``NAME=VALUE``, or has one of ``!= < <= > >=``. Nothing after the sign stands for
"no value". Several conditions all have to hold.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from explorer.cache import FeatureCache
from explorer.index import PairIndex, table_columns
from fpo_core.errors import UsageError
from fpo_core.lists import lists_of
from fpo_core.progress import Progress

ORDERS: dict[str, Callable[[pl.Expr, pl.Expr], pl.Expr]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
SIGNS = ("<=", ">=", "!=", "=", "<", ">")  # the longer first
TRUTHS = {"true": True, "false": False}
NAMES = {pa.string(): "text", pa.int64(): "whole numbers", pa.float64(): "numbers"}


class Condition(NamedTuple):
    """One condition on one metadata column."""

    column: str
    sign: str
    value: str | int | float | bool | None  # None: the pair has no value

    def expression(self) -> pl.Expr:
        """Return the condition as a polars expression that is never null."""
        column, value = pl.col(self.column), pl.lit(self.value)
        if self.sign in ORDERS:
            return ORDERS[self.sign](column, value).fill_null(value=False)
        equal = column.eq_missing(value)
        return equal if self.sign == "=" else ~equal


def parse_conditions(
    texts: Sequence[str], columns: Mapping[str, pa.DataType]
) -> tuple[Condition, ...]:
    """Read conditions as people write them; empty texts are left out.

    Args:
        texts: Such as ``topic=maths``.
        columns: Type of each metadata column that the pairs have.

    Raises:
        UsageError: Naming the columns there are, or the values that a column has.
    """
    return tuple(_condition(text, columns) for text in texts if text.strip())


def _condition(text: str, columns: Mapping[str, pa.DataType]) -> Condition:
    if not columns:
        raise UsageError(
            f"cannot filter by {text[:80]!r}: these pairs have no metadata columns. List columns "
            "in `data.metadata` of the recipe and run it again"
        )
    stripped = text.strip()
    for name in sorted(columns, key=len, reverse=True):  # a name may itself contain a sign
        rest = stripped.removeprefix(name).lstrip()
        sign = next((one for one in SIGNS if rest.startswith(one)), None)
        if stripped.startswith(name) and sign:
            value = _value(name, columns[name], sign, rest.removeprefix(sign))
            return Condition(name, sign, value)
    raise UsageError(
        f"unknown metadata column in {text[:80]!r}; write NAME=VALUE with one of: "
        f"{', '.join(columns)}"
    )


def _value(name: str, kind: pa.DataType, sign: str, text: str) -> str | int | float | bool | None:
    """Return the value as its column's type has it."""
    if not text.strip() and sign not in ORDERS:
        return None
    if sign in ORDERS and kind not in (pa.int64(), pa.float64()):
        raise UsageError(f"{name}{sign}{text[:80]}: column {name} has no order; use = or !=")
    if pa.types.is_string(kind):
        return text
    if pa.types.is_boolean(kind):
        if text.strip().lower() not in TRUTHS:
            raise UsageError(f"{name}{sign}{text[:80]}: column {name} holds true and false only")
        return TRUTHS[text.strip().lower()]
    with suppress(ValueError):
        value = int(text) if pa.types.is_integer(kind) else float(text)
        if isinstance(value, float) or -(2**63) <= value < 2**63:
            return value
    raise UsageError(f"{name}{sign}{text[:80]}: column {name} holds {NAMES[kind]} only")


def matching_pairs(cache: FeatureCache, conditions: tuple[Condition, ...]) -> np.ndarray:
    """Return the numbers of the pairs that meet all conditions, ascending.

    Args:
        cache: The cache.
        conditions: As ``parse_conditions`` gives them for this cache; none: all pairs.
    """
    if not conditions:
        return np.arange(cache.n_pairs)
    columns = list(dict.fromkeys(one.column for one in conditions))
    frames = [pl.DataFrame(table) for table in table_columns(cache.pairs, "", columns)]
    frame = pl.concat(frames).with_columns(pl.selectors.float().fill_nan(None))  # NaN: no value
    met = pl.all_horizontal(one.expression() for one in conditions)
    return np.flatnonzero(frame.select(met).to_series().to_numpy())


def restricted_stats(cache: FeatureCache, index: PairIndex, numbers: np.ndarray) -> pl.DataFrame:
    """Return ``small_stats`` with the means over some pairs only.

    A feature that a response does not store counts as 0 there, so a mean can be too low by what is
    not stored. Density, mean and max stay those of all pairs.

    Args:
        cache: The cache.
        index: Its index of pairs.
        numbers: Of the pairs, as ``matching_pairs`` gives them.
    """
    totals = np.zeros((2, cache.sae.d_sae))
    picked = np.zeros(2 * cache.n_pairs, dtype=bool)
    picked[2 * numbers] = picked[2 * numbers + 1] = True
    shards = [
        n for n in range(len(index.shards) - 1) if picked[slice(*index.shards[n : n + 2])].any()
    ]
    with Progress("means", total=len(shards), unit="shard") as progress:
        for shard in shards:
            table = cache.artifact.rows("pooled", shard, None, ["indices", "values"])
            _add_means(totals, table, picked[slice(*index.shards[shard : shard + 2])])
            progress.advance(1)
    chosen, rejected = totals / max(1, len(numbers))
    means = pl.DataFrame({"mean_chosen": chosen, "mean_rejected": rejected}).cast(pl.Float32)
    found = cache.small_stats.sort("feature").with_columns(means)
    return found.with_columns(difference=pl.col("mean_chosen") - pl.col("mean_rejected"))


def _add_means(totals: np.ndarray, table: pa.Table, picked: np.ndarray) -> None:
    """Add a shard's stored means of the picked responses to the sums [2, F] of the sides."""
    indices, values = lists_of(table, "indices"), lists_of(table, "values").values
    rows = np.repeat(np.arange(table.num_rows), indices.lengths)
    for side in (0, 1):
        mine = picked[rows] & (rows % 2 == side)
        totals[side] += np.bincount(
            indices.values[mine], weights=values[mine], minlength=totals.shape[1]
        )
