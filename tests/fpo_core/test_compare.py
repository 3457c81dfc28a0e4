"""Runs against each other: values, paired intervals, what is refused, and what rows are named."""

import json

import numpy as np
import polars as pl
import pytest

from fpo_core.errors import FPOError
from fpo_core.evaluation.compare import (
    PAIRS,
    REFERENCE,
    SAE,
    SAMPLING,
    Measured,
    compare,
    in_order,
)
from fpo_core.evaluation.differing import differing_settings, run_names, shown
from fpo_core.evaluation.heldout import BY_PAIR, HeldoutScores
from fpo_core.evaluation.metrics import (
    ANSWER_METRICS,
    METRICS,
    Answered,
    answer_metrics,
    heldout_metrics,
)
from fpo_core.evaluation.tables import read_answered, read_heldout
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.options import objective_options
from fpo_core.recipe.training import TrainSettings

KEY = {REFERENCE: "a model", SAE: "an SAE", SAMPLING: "temperature=0.7"}
IDS = [f"{number:016x}" for number in range(40)]


def heldout(seed: int, ids=IDS, tokens_seed: int = 0) -> HeldoutScores:
    """Scores of a policy; tokens and reference are the same under every seed."""
    shared, own = np.random.default_rng(tokens_seed), np.random.default_rng(100 + seed)
    shape = (len(ids), 2)
    tokens = shared.integers(3, 40, shape).astype(float)
    reference = -tokens * shared.uniform(1, 3, shape)
    return HeldoutScores(
        list(ids), tokens, reference + own.normal(0, 5, shape), reference,
        own.uniform(0, 9, shape), tokens * own.uniform(1, 2, shape),
        tokens * shared.uniform(1, 2, shape), own.uniform(0, 1, shape),
        np.zeros((2, 0)), np.zeros((2, 0)),
    )  # fmt: skip


def answered(seed: int, count: int = 12) -> Answered:
    own = np.random.default_rng(seed)
    return Answered(
        IDS[:count], own.uniform(1, 2, count), np.full(count, 1.5),
        own.integers(1, 64, count).astype(float), np.full(count, 30.0),
    )  # fmt: skip


def measured(name: str, seed: int, **key: str) -> Measured:
    return Measured(name, heldout(seed), answered(seed), {**KEY, **key})


def shuffled(scores, seed: int = 3):
    order = np.random.default_rng(seed).permutation(len(scores.pair_ids))
    columns = BY_PAIR if isinstance(scores, HeldoutScores) else Answered._fields[1:]
    moved = {column: getattr(scores, column)[order] for column in columns}
    return scores._replace(pair_ids=[scores.pair_ids[row] for row in order], **moved)


def test_values_and_intervals_are_those_of_each_runs_own_evaluation():
    runs = [measured("a", 1), measured("b", 2), measured("c", 3)]
    found = compare(runs, 300, 7)
    assert [metric.key for metric in found.metrics] == [*METRICS, *ANSWER_METRICS]
    for place, run in enumerate(runs):
        own = heldout_metrics(run.heldout, 300, 7) + answer_metrics(run.answered, 300, 7)
        for metric, alone in zip(found.metrics, own, strict=True):
            assert metric.runs[place] == alone.policy
            assert metric.reference == alone.reference
    assert not found.refused
    assert [(d.run, d.minus) for d in found.metrics[0].differences] == [(1, 0), (2, 0), (2, 1)]


def test_intervals_of_differences_are_scipys():
    """``scipy.stats.bootstrap`` draws otherwise: equal up to the noise of many resamples."""
    stats = pytest.importorskip("scipy.stats")
    one, two = measured("a", 1), measured("b", 2)
    margin = next(m for m in compare([one, two], 20_000, 0).metrics if m.key == "margin")
    values = [METRICS["margin"].policy(run.heldout) for run in (one, two)]

    def gap(after, before, axis):
        return after.mean(axis) - before.mean(axis)

    theirs = stats.bootstrap(
        (values[1], values[0]), gap, paired=True, vectorized=True, n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    ours = margin.differences[0].estimate
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values[1].mean() - values[0].mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)
    # Each end's own interval is scipy's as well.
    alone = stats.bootstrap(
        (values[0],), np.mean, vectorized=True, n_resamples=20_000, method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert margin.runs[0].low == pytest.approx(alone.low, abs=0.02 * (alone.high - alone.low))


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    """Pairs drawn anew from a known population: some 95 % of intervals hold the true difference.

    Both policies share most of what a pair is worth, so an interval that treated them as
    independent would be several times as wide and hold it always.
    """
    rng, truth, held, widths = np.random.default_rng(5), 0.3, 0, []
    count, simulations = 60, 400
    ids = IDS[:30] + [f"{number:016x}" for number in range(100, 130)]
    for trial in range(simulations):
        hard = rng.normal(0, 3, count)
        runs = [
            _with_margin(str(place), ids, hard + gain + rng.normal(0, 0.5, count))
            for place, gain in enumerate((0.0, truth))
        ]
        metric = next(m for m in compare(runs, 200, trial).metrics if m.key == "margin")
        (difference,) = metric.differences
        low, high = difference.estimate.low, difference.estimate.high
        held += low <= truth <= high
        widths.append((high - low) / (metric.runs[0].high - metric.runs[0].low))
    # 0.95 less what a percentile interval of 60 pairs and 200 resamples falls short of.
    assert 0.90 <= held / simulations <= 0.975
    assert np.mean(widths) < 0.3


def _with_margin(name: str, ids: list[str], margins: np.ndarray) -> Measured:
    scores = heldout(0, ids)._replace(
        tokens=np.ones((len(ids), 2)), policy_logps=np.stack([margins, 0 * margins], 1)
    )
    return Measured(name, scores, Answered([], *[np.zeros(0)] * 4), KEY)


def test_rows_are_joined_by_pair_whatever_their_order():
    one, two = measured("a", 1), measured("b", 2)
    other = two._replace(heldout=shuffled(two.heldout), answered=shuffled(two.answered))
    assert compare([one, other], 100, 0) == compare([one, two], 100, 0)


def test_other_pairs_are_refused_and_the_differences_listed():
    more = heldout(2, [*IDS[:-1], "f" * 16, "e" * 16])
    found = compare([measured("a", 1), measured("b", 2)._replace(heldout=more)], 50, 0)
    assert {one.key for one in found.refused} == set(METRICS)
    assert {metric.key for metric in found.metrics} == set(ANSWER_METRICS)
    reason = found.refused[0].reason
    assert f"{PAIRS} (1 only in a: {IDS[-1]}; 2 only in b: {'e' * 16}, {'f' * 16})" in reason
    with pytest.raises(
        FPOError, match=f"other pairs: 1 only in the first: {IDS[-1]}; 2 only in this"
    ):
        in_order(more, IDS, "b")
    twice = heldout(1, [*IDS[:2], IDS[0]])
    with pytest.raises(FPOError, match=f"more than once: {IDS[0]}"):
        in_order(twice, IDS, "b")


@pytest.mark.parametrize(
    ("what", "left_out"),
    [
        (SAE, {key for key in METRICS if key.startswith("discrepancy")}),
        (REFERENCE, {key for key in METRICS if key.startswith(("discrepancy", "kl", "reward"))}),
        (SAMPLING, set(ANSWER_METRICS)),
    ],
)
def test_what_a_metric_depends_on_has_to_be_the_same(what, left_out):
    runs = [measured("a", 1), measured("b", 2), measured("c", 3, **{what: "another"})]
    found = compare(runs, 50, 0)
    assert {one.key for one in found.refused} == left_out
    assert {metric.key for metric in found.metrics} == {*METRICS, *ANSWER_METRICS} - left_out
    assert f"differ in the {what} (a, b: {KEY[what]}; c: another)" in found.refused[0].reason
    if what == REFERENCE:
        assert all(metric.reference is None for metric in found.metrics)


def test_other_tokens_of_the_same_pairs_leave_the_accuracy_alone():
    other = measured("b", 2)._replace(heldout=heldout(2, tokens_seed=9))
    found = compare([measured("a", 1), other], 50, 0)
    assert [metric.key for metric in found.metrics] == ["accuracy"]
    assert "tokens of the held-out pairs (a: " in found.refused[0].reason


def test_runs_with_nothing_in_common_are_an_error():
    other = measured("b", 2)._replace(heldout=heldout(2, ["0" * 15 + "z"]), answered=answered(1, 3))
    with pytest.raises(FPOError, match="no metric that can be compared.*held-out pairs.*prompts"):
        compare([measured("a", 1), other], 50, 0)


def test_runs_without_sampled_answers_have_no_metric_of_them():
    none = Answered([], *[np.zeros(0)] * 4)
    runs = [measured(name, 1)._replace(answered=none) for name in "ab"]
    found = compare(runs, 50, 0)
    assert {metric.key for metric in found.metrics} == set(METRICS)
    assert not found.refused
    some = compare([runs[0], measured("c", 2)], 50, 0)
    assert {one.key for one in some.refused} == set(ANSWER_METRICS)


def test_the_tables_of_an_evaluation_read_back():
    scores = heldout(4)
    columns = {"pair_id": scores.pair_ids}
    for name, values in scores.by_pair().items():
        columns |= {f"{name}_chosen": values[:, 0], f"{name}_rejected": values[:, 1]}
    found = read_heldout(pl.DataFrame(columns))
    assert found.pair_ids == scores.pair_ids
    for name in BY_PAIR:
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name))
    rows = [
        {"pair_id": "p", "before_tokens": 3, "after_tokens": 5, "before_entropy": 0.5,
         "after_entropy": 0.25},
        {"pair_id": "q", "before_tokens": 5, "after_tokens": 9, "before_entropy": 1.5,
         "after_entropy": 0.75},
    ]  # fmt: skip
    entropy, length = answer_metrics(read_answered(pl.DataFrame(rows)), 50, 0)
    assert (entropy.reference, entropy.policy) != (None, None)
    assert entropy.policy.value == 0.5
    assert length.key == "answer_length"
    assert length.reference is not None
    assert length.difference is not None
    assert (length.reference.value, length.policy.value, length.difference.value) == (4, 7, 3)
    assert (length.difference.low, length.difference.high) == (2, 4)
    assert read_answered(pl.DataFrame()).pair_ids == []


def settings(method: str, **more: object) -> dict:
    """Training settings as the policy's manifest has them."""
    options = objective_options(TrainSettings(method=method))._asdict()
    return {
        "train.method": method, "train.seed": 0,
        **{f"train.{name}": value for name, value in options.items()},
        "sae.layer": "25", "sae.site": "resid_post", **more,
    }  # fmt: skip


def test_rows_of_the_papers_tables():
    """Table 2: methods; 3: layer and site; 6: alpha and stop-gradient; 7: the layers of SAEs."""
    assert differing_settings([settings(method) for method in METHODS]) == ["train.method"]
    places = [
        settings("fpo", **{"sae.layer": layer, "sae.site": site})
        for layer in ("7", "25") for site in ("resid_post", "mlp_out")
    ]  # fmt: skip
    assert differing_settings(places) == ["sae.layer", "sae.site"]
    ablation = [
        settings("fpo", **{"train.alpha": alpha, "train.stop_gradient": held})
        for held in (False, True) for alpha in (0.1, 0.5)
    ]  # fmt: skip
    keys = differing_settings(ablation)
    assert keys == ["train.alpha", "train.stop_gradient"]
    assert run_names(ablation, keys, "abcd")[1] == "FPO, α 0.5, stop-gradient no"
    assert differing_settings(
        [settings("fpo", **{"sae.layer": one}) for one in ("25", "0+25")]
    ) == ["sae.layer"]


def test_a_setting_of_the_objective_counts_where_a_run_departs_from_it():
    runs = [settings("dpo"), settings("fpo", **{"train.alpha": 2.0})]
    keys = differing_settings(runs)
    assert keys == ["train.method", "train.alpha"]
    assert run_names(runs, keys, "ab") == ["DPO", "FPO, α 2"]
    assert [shown(keys[1], run["train.alpha"]) for run in runs] == ["–", "2"]


def test_names_are_never_alike():
    runs = [settings("fpo"), settings("fpo"), settings("fpo", **{"train.seed": 1})]
    assert differing_settings(runs[:2]) == []
    names = run_names(runs, ["train.seed"], ["evaluation/a", "evaluation/b", "evaluation/c"])
    assert names == ["FPO, seed 0 (evaluation/a)", "FPO, seed 0 (evaluation/b)", "FPO, seed 1"]
    groups = [settings("fpo", **{"train.groups": [{"name": one}]}) for one in "ab"]
    (key,) = differing_settings(groups)
    assert json.loads(shown(key, groups[0][key])) == [{"name": "a"}]
