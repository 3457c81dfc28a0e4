"""Effect sizes and intervals of the audit, beside scipy on the same paired differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fpo_core.errors import FPOError
from fpo_core.evaluation.audit import (
    Groups,
    Moments,
    MomentSums,
    audit_table,
    changes,
    discovery_rates,
    group_table,
)

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


def test_of_one_response_there_is_no_interval():
    one = moments_of(np.array([[1.0, 0.0]]), np.array([[3.0, 0.0]]))
    table = audit_table(one)
    assert table.select("feature", "side", "change", "p", "q").rows() == [
        (0, "chosen", 2.0, 1.0, 1.0), (0, "rejected", 2.0, 1.0, 1.0),
    ]  # fmt: skip
    assert table["low"].is_nan().all()


def test_groups_move_apart_by_the_difference_of_their_means():
    rng = np.random.default_rng(0)
    before, after = rng.random((2, 12, 6))
    groups = Groups({"a": [0, 5], "b": [2]}, 6, [("a", "b")])
    sums = MomentSums(3)
    for rows in (slice(0, 4), slice(4, 12)):  # in two batches
        sums.add(groups.means(before[rows]), groups.means(after[rows]))
    table = group_table(groups, sums.moments())
    assert table.select("group", "size", "side").rows()[:3] == [
        ("a", 2, "chosen"), ("b", 1, "chosen"), ("a - b", 3, "chosen"),
    ]  # fmt: skip
    moved = (after - before)[1::2]
    apart = moved[:, [0, 5]].mean(1) - moved[:, 2]
    (row,) = table.filter(group="a - b", side="rejected").to_dicts()
    expected = stats.ttest_1samp(apart, 0)
    assert (row["change"], row["p"]) == pytest.approx((apart.mean(), expected.pvalue))
    with pytest.raises(FPOError, match="there is no group 'c'; there are: a, b"):
        Groups({"a": [0], "b": [2]}, 6, [("a", "c")])


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


def test_what_is_no_number_is_not_judged_and_spoils_no_other():
    p = np.array([0.01, np.nan, 0.5, np.nan])
    tested = np.array([True, True, True, False])
    q = discovery_rates(p, tested)
    assert q[[0, 2]] == pytest.approx(stats.false_discovery_control([0.01, 0.5]))
    assert np.isnan(q[1])
    assert q[3] == 1
