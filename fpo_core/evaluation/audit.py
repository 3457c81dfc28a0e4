"""What preference training moved, feature by feature: effect sizes on held-out responses.

A response's change of a feature is the policy's mean activation over its scored tokens less the
reference's. Over P responses of one side: the mean change with its 95 % t-interval, the effect size
d = mean / standard deviation (Cohen's d of paired differences), a two-sided t-test, and q, the
false discovery rate at which it counts as moved (Benjamini and Hochberg, over all features and
sides). Two numbers a feature are added up, so memory follows the SAE's width, not the pairs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch

from fpo_core.data.batches import PairIds, batches_by_length, collate
from fpo_core.errors import FPOError
from fpo_core.features.pool import pool_features
from fpo_core.models.forward import scored_activations
from fpo_core.progress import not_shown
from fpo_core.sae.coder import AttachedSae

SIDES = ("chosen", "rejected")
CONFIDENCE = 0.95
RATE = 0.05  # false discovery rate at which a feature counts as moved


class Moments(NamedTuple):
    """Sums over responses, by side, of quantities [2, F] (features, or groups of them)."""

    responses: int  # of each side
    reference: np.ndarray  # sum of means
    policy: np.ndarray
    change: np.ndarray  # sum of policy less reference
    squares: np.ndarray  # sum of its squares


class Changes(NamedTuple):
    """How features moved on one side; arrays [F]."""

    reference: np.ndarray  # mean over responses
    policy: np.ndarray
    change: np.ndarray
    low: np.ndarray  # of its 95 % interval
    high: np.ndarray
    effect: np.ndarray  # change over the standard deviation of changes; 0 where nothing changed
    p: np.ndarray


class MomentSums:
    """Adds them up, batch by batch.

    Args:
        width: F.
    """

    def __init__(self, width: int) -> None:
        self._responses, self._sums = 0, np.zeros((4, 2, width))

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        """Means [2P, F] of reference and policy, chosen and rejected responses in turn."""
        change = after - before
        for place, values in enumerate((before, after, change, change**2)):
            for side in (0, 1):
                self._sums[place, side] += values[side::2].sum(0)
        self._responses += len(before) // 2

    def moments(self) -> Moments:
        """Of what was added."""
        return Moments(self._responses, *self._sums)


class Groups:
    """Sets of features whose mean is followed, and two of them against each other.

    Args:
        features: by the name of the group.
        d_sae: features of the SAE.
        against: pairs of groups whose difference is followed too.

    Raises:
        FPOError: a group is empty, has a feature that the SAE does not, or is not there.
    """

    def __init__(
        self, features: Mapping[str, Sequence[int]], d_sae: int,
        against: Sequence[tuple[str, str]] = (),
    ) -> None:  # fmt: skip
        for name, members in features.items():
            _check_group(name, members, d_sae)
        check_against(features, against)
        self.names = [*features, *(f"{one} - {other}" for one, other in against)]
        self.sizes = [len(members) for members in features.values()]
        self.sizes += [len(features[one]) + len(features[other]) for one, other in against]
        self._members = [np.asarray(members) for members in features.values()]
        place = {name: number for number, name in enumerate(features)}
        self._against = [(place[one], place[other]) for one, other in against]

    def means(self, pooled: np.ndarray) -> np.ndarray:
        """Of each group in each response [R, G], from the features' [R, F]."""
        found = [pooled[:, members].mean(1) for members in self._members]
        found += [found[one] - found[other] for one, other in self._against]
        return np.stack(found, 1) if found else np.zeros((len(pooled), 0))


def check_against(groups: Collection[str], against: Sequence[tuple[str, str]]) -> None:
    """Refuse pairs of groups of which one is not there.

    Raises:
        FPOError: naming it.
    """
    unknown = [name for pair in against for name in pair if name not in groups]
    if unknown:
        there = ", ".join(groups) or "none"
        raise FPOError(f"there is no group {unknown[0]!r}; there are: {there}")


def _check_group(name: str, members: Sequence[int], d_sae: int) -> None:
    beyond = [feature for feature in members if not 0 <= feature < d_sae]
    if beyond:
        raise FPOError(
            f"group {name}: feature {beyond[0]} is not in this SAE, whose features are 0 to "
            f"{d_sae - 1}"
        )
    if not members:
        raise FPOError(f"group {name}: it has no features")


@torch.no_grad()
def audit_moments(
    policy: Any,
    reference: Any,
    pairs: Sequence[PairIds],
    sae: AttachedSae,
    groups: Groups,
    *,
    tokens_per_batch: int,
    on_pairs: Callable[[int], None] = not_shown,
) -> tuple[Moments, Moments]:
    """Run policy and reference over held-out pairs, up to the SAE.

    Args:
        policy: the trained model.
        reference: the model it started from.
        pairs: held-out pairs.
        sae: the SAE.
        groups: whose means are followed too.
        tokens_per_batch: most tokens a forward pass, padding included.
        on_pairs: told how many pairs were done after each batch.

    Returns:
        The moments of the features, and of the groups in their order.
    """
    features, grouped = MomentSums(sae.coder.d_sae), MomentSums(len(groups.names))
    for rows in batches_by_length([pair.length for pair in pairs], tokens_per_batch):
        batch = collate([pairs[row] for row in rows], device=str(policy.device))
        pooled = []
        for model in (reference, policy):
            (x,) = scored_activations(model, batch, [sae.hookpoint])
            found = pool_features(sae.coder, x, batch.response, batch.lengths)
            pooled.append(found.cpu().double().numpy())
        features.add(*pooled)
        grouped.add(*map(groups.means, pooled))
        on_pairs(len(rows))
    return features.moments(), grouped.moments()


def audit_table(moments: Moments) -> pl.DataFrame:
    """How features moved: a row a feature and side that ever fires.

    Returns:
        ``feature``, ``side``, the columns of ``Changes`` and ``q``; those that count as moved
        first, the largest effects first.
    """
    both = [changes(moments, side) for side in (0, 1)]
    fires = np.stack([(one.reference > 0) | (one.policy > 0) for one in both])
    rates = discovery_rates(np.stack([one.p for one in both]), fires)
    frames = []
    for side, found in enumerate(both):
        columns: dict[str, Any] = {"feature": np.arange(fires.shape[1], dtype=np.uint32)}
        columns |= {**found._asdict(), "q": rates[side]}
        frame = pl.DataFrame(columns).insert_column(1, pl.lit(SIDES[side]).alias("side"))
        frames.append(frame.filter(pl.Series(fires[side])))
    return pl.concat(frames).sort(
        [pl.col("q") >= RATE, pl.col("effect").abs(), "feature"], descending=[False, True, False]
    )


def group_table(groups: Groups, moments: Moments) -> pl.DataFrame:
    """How the groups' means moved: a row a group and side; ``group``, ``size``, ``side`` first."""
    return pl.concat(
        pl.DataFrame(
            {"group": groups.names, "size": groups.sizes, "side": [SIDES[side]] * len(groups.names),
             **changes(moments, side)._asdict()},
            schema_overrides={"group": pl.String, "size": pl.Int64, "side": pl.String},
        )
        for side in (0, 1)
    )  # fmt: skip


def changes(moments: Moments, side: int) -> Changes:
    """How features moved on one side.

    Args:
        moments: of one response a side at least; of one alone, intervals are NaN and p is 1.
        side: 0 chosen, 1 rejected.
    """
    from scipy import stats  # takes over a second

    n = moments.responses
    mean = moments.change[side] / n
    if n < 2:  # of one response there is a change and no more
        unknown = np.full_like(mean, np.nan)
        return Changes(
            moments.reference[side], moments.policy[side], mean, unknown, unknown, unknown,
            np.ones_like(mean),
        )  # fmt: skip
    # Rounding makes the variance of a constant change negative, by the size of its square.
    spread = moments.squares[side] / n - mean**2
    spread = np.where(spread > 1e-12 * np.maximum(mean**2, 1e-30), spread, 0.0)
    deviation = np.sqrt(spread * n / (n - 1))
    error = deviation / np.sqrt(n)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        effect = np.where(mean == 0, 0.0, mean / deviation)
        p = np.where(mean == 0, 1.0, 2 * stats.t.sf(np.abs(mean / error), n - 1))
    return Changes(
        moments.reference[side] / n, moments.policy[side] / n, mean, mean - half, mean + half,
        effect, p,
    )  # fmt: skip


def discovery_rates(p: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """q of each test: the false discovery rate at which it counts; 1 where nothing was tested.

    A policy that broke has values that are no numbers: nothing is known of these.

    Args:
        p: p-values.
        tested: which of them are of tests: a feature that never fires is none.
    """
    from scipy import stats  # takes over a second

    q = np.where(tested & ~np.isfinite(p), np.nan, 1.0)
    tested = tested & np.isfinite(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested])
    return q
