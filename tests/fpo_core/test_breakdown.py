"""Results by group against polars group_by, and the rules by which pairs are put into groups."""

import numpy as np
import polars as pl
import pytest

from fpo_core.evaluation.audit import MomentSums
from fpo_core.evaluation.breakdown import BREAKDOWN_SCHEMA, break_down, group_pairs
from fpo_core.evaluation.heldout import BY_PAIR, HeldoutScores
from fpo_core.evaluation.metrics import METRICS, heldout_metrics

PAIRS, DRAWS, SEED = 60, 200, 3


def random_scores(count: int = PAIRS) -> HeldoutScores:
    rng = np.random.default_rng(0)
    found = {name: rng.normal(size=(count, 2)) for name in BY_PAIR}
    found["tokens"] = rng.integers(1, 30, (count, 2)).astype(float)
    none = MomentSums(0).moments()
    return HeldoutScores([f"{n:016x}" for n in range(count)], **found, features=none, groups=none)


def metadata() -> pl.DataFrame:
    rng = np.random.default_rng(1)
    topics = rng.choice(["maths", "code", "prose"], PAIRS, p=[0.6, 0.3, 0.1]).tolist()
    topics[7] = None
    return pl.DataFrame(
        {
            "topic": topics,
            "turns": rng.integers(1, 5, PAIRS),
            "checked": rng.random(PAIRS) < 0.5,
            "score": rng.normal(size=PAIRS).round(3),
        }
    )


def make(values, dtype=None) -> list[tuple[str, str, int]]:
    column = pl.Series("x", values, dtype=dtype)
    groups = group_pairs(column)
    rows = np.sort(np.concatenate([one.rows for one in groups]))
    np.testing.assert_array_equal(rows, np.arange(len(column)))  # each pair once
    return [(one.name, one.kind, len(one.rows)) for one in groups]


@pytest.mark.parametrize("column", ["topic", "turns", "checked"])
def test_values_equal_polars_group_by(column):
    scores, frame = random_scores(), metadata()
    found = break_down(scores, frame, DRAWS, SEED).filter(pl.col("column") == column)
    table = frame.with_columns(
        **{
            f"{name}_{side}": values[:, n]
            for name, values in scores.by_pair().items()
            for n, side in enumerate(("chosen", "rejected"))
        }
    )

    def per_token(who, side):
        return pl.col(f"{who}_logps_{side}") / pl.col(f"tokens_{side}")

    def margin(who):
        return per_token(who, "chosen") - per_token(who, "rejected")

    expected = table.group_by(pl.col(column).cast(pl.String).fill_null("null")).agg(
        pairs=pl.len(),
        accuracy=(margin("policy") > 0).mean(),
        accuracy_reference=(margin("reference") > 0).mean(),
        margin=margin("policy").mean(),
        margin_reference=margin("reference").mean(),
        kl_chosen=pl.col("kl_chosen").mean(),
        kl_rejected=pl.col("kl_rejected").mean(),
        discrepancy=((pl.col("discrepancy_chosen") + pl.col("discrepancy_rejected")) / 2).mean(),
    )
    assert found["group"].n_unique() == expected.height
    for row in expected.iter_rows(named=True):
        mine = found.filter(pl.col("group") == row[column])
        values = dict(mine.select("metric", "policy").iter_rows())
        reference = dict(mine.select("metric", "reference").iter_rows())
        assert mine["metric"].to_list() == list(METRICS)
        assert set(mine["pairs"]) == {row["pairs"]}
        for key in ("accuracy", "margin", "kl_chosen", "kl_rejected", "discrepancy"):
            assert values[key] == pytest.approx(row[key]), (row, key)
        for key in ("accuracy", "margin"):
            assert reference[key] == pytest.approx(row[f"{key}_reference"])
        assert reference["kl_chosen"] is None


def test_a_group_of_all_pairs_has_the_overall_metrics_and_intervals():
    scores = random_scores()
    frame = break_down(scores, pl.DataFrame({"same": ["x"] * PAIRS}), DRAWS, SEED)
    for row, metric in zip(
        frame.iter_rows(named=True), heldout_metrics(scores, DRAWS, SEED), strict=True
    ):
        assert (row["metric"], row["pairs"], row["values"]) == (metric.key, PAIRS, 1)
        for name in ("reference", "policy", "difference"):
            estimate = getattr(metric, name)
            given = tuple(row[f"{name}{end}"] for end in ("", "_low", "_high"))
            assert given == ((None,) * 3 if estimate is None else tuple(estimate))


def test_no_metadata_gives_an_empty_table():
    frame = break_down(random_scores(), pl.DataFrame(), DRAWS, SEED)
    assert (frame.height, frame.schema) == (0, BREAKDOWN_SCHEMA)


def test_texts_are_in_order_of_frequency_and_null_is_a_group():
    assert make(["b", "a", None, "a", "c", "b", "b"]) == [
        ("b", "value", 3),
        ("a", "value", 2),
        ("c", "value", 1),
        ("null", "null", 1),
    ]
    # A text may read like a group of ours: the kind tells them apart.
    assert make(["null", None]) == [("null", "value", 1), ("null", "null", 1)]


def test_twenty_texts_are_a_group_each_and_of_more_the_rarest_are_other():
    twenty = [f"t{n:02}" for n in range(20) for _ in range(30 - n)]
    assert [name for name, _, _ in make(twenty)] == [f"t{n:02}" for n in range(20)]
    many = [f"t{n:02}" for n in range(25) for _ in range(30 - n)]
    groups = group_pairs(pl.Series("x", many))
    assert [one.name for one in groups] == [*(f"t{n:02}" for n in range(19)), "other"]
    assert (groups[-1].kind, groups[-1].values) == ("other", 6)
    assert len(groups[-1].rows) == sum(30 - n for n in range(19, 25))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False, True, None], [("false", 1), ("true", 2), ("null", 1)]),
        ([10, 9, 10, 2], [("2", 1), ("9", 1), ("10", 2)]),
        ([4.0, 5.0, 4.0, float("nan")], [("4", 2), ("5", 1), ("null", 1)]),
        ([0.5, 1.5, 2.5, 3.5], [("0.5", 1), ("1.5", 1), ("2.5", 1), ("3.5", 1)]),
        ([0.5] * 9 + [7.25], [("0.5", 9), ("7.25", 1)]),
        (
            list(range(100)),
            [("0 to 24", 25), ("25 to 49", 25), ("50 to 74", 25), ("75 to 99", 25)],
        ),
        (
            [n / 8 + 12345 for n in range(40)],
            [
                ("12345 to 12346.125", 10),
                ("12346.25 to 12347.375", 10),
                ("12347.5 to 12348.625", 10),
                ("12348.75 to 12349.875", 10),
            ],
        ),
        (
            [1 + n * 1e-9 for n in range(1, 5)],
            [("1.000000001", 1), ("1.000000002", 1), ("1.000000003", 1), ("1.000000004", 1)],
        ),
        ([None, None], [("null", 2)]),
    ],
)
def test_bools_and_numbers(values, expected):
    assert [(name, count) for name, _, count in make(values)] == expected


def test_quarters_hold_as_many_pairs_each_and_do_not_overlap():
    values = np.random.default_rng(2).normal(size=1000)
    groups = group_pairs(pl.Series("x", values))
    assert [len(one.rows) for one in groups] == [250] * 4
    for below, above in zip(groups, groups[1:], strict=False):
        assert values[below.rows].max() < values[above.rows].min()
