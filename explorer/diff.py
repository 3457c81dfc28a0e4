"""Two caches beside each other: of one SAE on two data sets, or of two SAEs on one."""

import numpy as np
import polars as pl

from explorer.cache import FeatureCache
from explorer.errors import NotReadable
from explorer.index import FeatureIndex

MATCHED = 1024  # features of each SAE that are matched, the densest ones


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
    chosen, rows = [], []
    for cache, its_index in ((one, index), (other, other_index)):
        densest = cache.small_stats.sort(["density", "feature"], descending=[True, False])
        features = densest.filter(pl.col("density") > 0)["feature"].head(MATCHED).to_numpy()
        chosen.append(features)
        rows.append(_standardized(its_index, features, 2 * one.n_pairs))
    if not len(chosen[0]) or not len(chosen[1]):
        raise NotReadable("one of the caches has no feature that ever fires")
    correlation = rows[0] @ rows[1].T
    best = correlation.argmax(1)
    frame = pl.DataFrame({
        "feature": chosen[0], "match": chosen[1][best],
        "correlation": correlation[np.arange(len(best)), best],
    })  # fmt: skip
    return frame.sort("correlation", descending=True)


def _standardized(index: FeatureIndex, features: np.ndarray, responses: int) -> np.ndarray:
    """Means over all responses [K, R], each row with mean 0 and length 1."""
    dense = np.zeros((len(features), responses), dtype=np.float32)
    for place, feature in enumerate(features):
        found = index.entries(int(feature))
        dense[place, found.rows] = found.values
    dense -= dense.mean(1, keepdims=True)
    length = np.linalg.norm(dense, axis=1, keepdims=True)
    return dense / np.where(length > 0, length, 1)
