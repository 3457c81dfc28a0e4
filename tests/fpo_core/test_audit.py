"""Effect sizes and intervals of the audit, beside scipy on the same paired differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fpo_core.evaluation.audit import Moments, changes, discovery_rates

VALUES = st.floats(0, 50, width=32)


def moments_of(reference, policy):
    """Of responses [P, F], the same on both sides."""
    change = policy - reference
    sums = [reference, policy, change, change**2]
    return Moments(len(reference), *(np.stack([one.sum(0)] * 2) for one in sums))


@given(st.lists(st.tuples(VALUES, VALUES), min_size=3, max_size=40))
def test_means_intervals_and_tests_are_scipys(pairs):
    reference, policy = (
        np.array(side, dtype=np.float64)[:, None] for side in zip(*pairs, strict=True)
    )
    difference = (policy - reference)[:, 0]
    found = changes(moments_of(reference, policy), 1)
    assert found.change[0] == pytest.approx(difference.mean(), abs=1e-9)
    deviation = difference.std(ddof=1)
    if deviation < 1e-4 * max(1.0, abs(difference.mean())):
        return  # rounding is all there is of it
    expected = stats.ttest_1samp(difference, 0)
    assert found.p[0] == pytest.approx(expected.pvalue, rel=1e-5, abs=1e-12)
    assert found.effect[0] == pytest.approx(difference.mean() / deviation, rel=1e-5, abs=1e-12)
    interval = expected.confidence_interval(0.95)
    assert (found.low[0], found.high[0]) == pytest.approx(interval, rel=1e-5, abs=1e-7)


def test_what_never_changes_has_no_effect_and_what_always_does_an_endless_one():
    reference = np.array([[1.0, 0.0, 2.0]] * 5)
    policy = np.array([[1.0, 0.0, 3.0]] * 5)
    found = changes(moments_of(reference, policy), 0)
    assert found.effect.tolist() == [0.0, 0.0, np.inf]
    assert found.p.tolist() == [1.0, 1.0, 0.0]
    assert (found.low[2], found.high[2]) == (1.0, 1.0)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_discovery_rates_are_benjamini_and_hochbergs(tests):
    p = np.array([one for one, _ in tests])
    tested = np.array([there for _, there in tests])
    found = discovery_rates(p, tested)
    assert (found[~tested] == 1).all()
    mine = sorted((one, place) for place, one in enumerate(p) if tested[place])
    best = 1.0
    for rank in range(len(mine), 0, -1):
        value, place = mine[rank - 1]
        best = min(best, value * len(mine) / rank)
        assert found[place] == pytest.approx(best)
