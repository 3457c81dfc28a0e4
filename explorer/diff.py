"""Two caches beside each other: of one SAE on two data sets, or of two SAEs on one."""

from collections.abc import Sequence

import numpy as np
import polars as pl

from explorer.cache import FeatureCache
from explorer.errors import NotReadable
from explorer.index import Entries, FeatureIndex

MATCHED = 1024  # features of each SAE that are matched, the densest ones
BLOCK = 32_768  # responses at a time: 130 MB of each SAE


def diff_caches(one: FeatureCache, other: FeatureCache) -> pl.DataFrame:
    """How the statistics of one SAE's features differ between two caches.

    Args:
        one: a cache.
        other: another, of the same SAE.

    Returns:
        A row a feature: ``mean``, ``density`` and ``difference`` of each (``_a``, ``_b``) and
        ``mean_change``, b less a; the largest changes first.

    Raises:
        NotReadable: they are of different SAEs.
    """
    if one.sae.identity != other.sae.identity:
        raise NotReadable(
            f"{one.name} and {other.name} are of different SAEs, whose features have nothing to do "
            f"with each other by number; on the same pairs they can be matched"
        )
    columns = ["feature", "mean", "density", "difference"]
    left, right = (
        cache.small_stats.select("feature", *(pl.col(c).alias(f"{c}_{s}") for c in columns[1:]))
        for cache, s in ((one, "a"), (other, "b"))
    )
    joined = left.join(right, on="feature", validate="1:1")
    change = pl.col("mean_b") - pl.col("mean_a")
    return joined.with_columns(mean_change=change).sort(change.abs(), descending=True)


def match_features(
    one: FeatureCache, other: FeatureCache, index: FeatureIndex, other_index: FeatureIndex
) -> pl.DataFrame:
    """The features of two SAEs that fire alike, by their means over the same responses.

    Args:
        one: a cache.
        other: another, of the same pairs.
        index: of the first.
        other_index: of the other.

    Returns:
        A row a feature of the first: its best match in the other, and their correlation; the
        strongest first. Of each SAE the densest features, ``MATCHED`` at most.

    Raises:
        NotReadable: they are of different pairs.
    """
    if one.pairs.name != other.pairs.name:
        raise NotReadable(
            f"{one.name} and {other.name} are of different pairs ({one.pairs.name}, "
            f"{other.pairs.name}): their features cannot be matched response by response"
        )
    chosen = [_densest(cache) for cache in (one, other)]
    if not len(chosen[0]) or not len(chosen[1]):
        raise NotReadable("one of the caches has no feature that ever fires")
    correlation = _correlation((index, other_index), chosen, 2 * one.n_pairs)
    best = correlation.argmax(1)
    frame = pl.DataFrame({
        "feature": chosen[0], "match": chosen[1][best],
        "correlation": correlation[np.arange(len(best)), best],
    })  # fmt: skip
    return frame.sort("correlation", descending=True)


def _densest(cache: FeatureCache) -> np.ndarray:
    ordered = cache.small_stats.sort(["density", "feature"], descending=[True, False])
    return ordered.filter(pl.col("density") > 0)["feature"].head(MATCHED).to_numpy()


def _correlation(
    indexes: Sequence[FeatureIndex], chosen: Sequence[np.ndarray], responses: int
) -> np.ndarray:
    """Of the means of each two features [K, K'] over all responses, a block of them at a time."""
    entries = [
        [index.entries(int(feature)) for feature in features]
        for index, features in zip(indexes, chosen, strict=True)
    ]
    sums, squares = ([np.zeros(len(features)) for features in chosen] for _ in range(2))
    products = np.zeros((len(chosen[0]), len(chosen[1])))
    for begin in range(0, responses, BLOCK):
        size = min(BLOCK, responses - begin)
        blocks = [_dense(found, begin, size) for found in entries]
        for side, block in enumerate(blocks):
            sums[side] += block.sum(1, dtype=np.float64)
            squares[side] += np.einsum("kr,kr->k", block, block, dtype=np.float64)
        products += blocks[0] @ blocks[1].T
    means = [one / responses for one in sums]
    spreads = [
        np.sqrt(np.maximum(square / responses - mean**2, 0.0))
        for square, mean in zip(squares, means, strict=True)
    ]
    covariance = products / responses - np.outer(*means)
    scale = np.outer(*spreads)
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)


def _dense(found: Sequence[Entries], begin: int, size: int) -> np.ndarray:
    """Means [K, size] of features over some responses in a row."""
    block = np.zeros((len(found), size), dtype=np.float32)
    for place, (rows, values) in enumerate(found):
        part = slice(*np.searchsorted(rows, [begin, begin + size]))
        block[place, rows[part] - begin] = values[part]
    return block
