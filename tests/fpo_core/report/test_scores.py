"""Scores in tables: equal keys together, others never, the number judged always there."""

import math

import pytest

from fpo_core.bench.model import Score
from fpo_core.errors import FPOError
from fpo_core.report.comparison_charts import Style, draw
from fpo_core.report.comparison_tables import tables
from fpo_core.report.scores import one_table, score_tables, why_apart, win_rates
from tests.fpo_core.report.example_comparison import example_comparison

KEY = {
    "benchmark": "alpaca_eval", "pack": "ab12", "judge": {"model": "judge-1", "revision": "r1"},
    "template": "cd34", "baseline": "ef56", "decoding": {"temperature": 0.7, "max_new_tokens": 64},
}  # fmt: skip


def record(value=55.5, temperature=0.7, judged=650, key=None, opponent="baseline", **changed):
    """A record of ``scores.json`` as the bench stage writes it, by hand."""
    scores = [
        Score("win_rate", "Win rate", "%", value, value - 3, value + 3, judged, 805),
        Score("lc_win_rate", "LC win rate", "%", value + 1, None, None, judged, 805),
    ]
    entries = {**KEY, **(key or {})}
    entries["decoding"] = {**entries["decoding"], "temperature": temperature}
    return {
        "key": entries, "benchmark": "alpaca_eval", "opponent": opponent,
        "temperature": temperature, "scores": [score._asdict() for score in scores], **changed,
    }  # fmt: skip


def test_scores_with_equal_keys_share_a_table():
    (table,) = score_tables({"FPO": [record(55.5)], "DPO": [record(51.0)]})
    assert [row.run for row in table.rows] == ["FPO", "DPO"]
    assert table.columns == {"win_rate": ("Win rate", "%"), "lc_win_rate": ("LC win rate", "%")}
    cell = table.rows[0].cells["win_rate"]
    assert (cell.value, cell.low, cell.high, cell.judged, cell.asked) == (
        55.5,
        52.5,
        58.5,
        650,
        805,
    )
    assert why_apart((table,)) == ()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"key": {"judge": {"model": "judge-1", "revision": "r2"}}}, "judge.revision"),
        ({"key": {"template": "0000"}}, "template"),
        ({"key": {"baseline": "0000"}}, "baseline"),
        ({"key": {"pack": "0000"}}, "pack"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_scores_with_different_keys_never_do(other, named):
    records = {"FPO": [record()], "DPO": [record(**other)]}
    found = score_tables(records)
    assert [[row.run for row in table.rows] for table in found] == [["FPO"], ["DPO"]]
    (sentence,) = why_apart(found)
    assert "2 tables" in sentence
    assert named in sentence
    with pytest.raises(FPOError, match=f"different keys cannot be in one table.*{named}"):
        one_table([("FPO", records["FPO"][0]), ("DPO", records["DPO"][0])])


def test_opponents_have_tables_of_their_own():
    found = score_tables({"FPO": [record(), record(opponent="DPO")]})
    assert [table.opponent for table in found] == ["baseline", "DPO"]
    assert why_apart(found) == ()


def test_bad_records_are_told():
    with pytest.raises(FPOError, match="score of run FPO has no key"):
        score_tables({"FPO": [{k: v for k, v in record().items() if k != "key"}]})
    scores = [{k: v for k, v in score.items() if k != "asked"} for score in record()["scores"]]
    with pytest.raises(FPOError, match="has no asked"):
        score_tables({"FPO": [record(scores=scores)]})
    with pytest.raises(FPOError, match="806 judged of 805 asked"):
        score_tables({"FPO": [record(judged=806)]})
    with pytest.raises(FPOError, match="two results of alpaca_eval against baseline"):
        score_tables({"FPO": [record(), record(60.0)]})
    assert len(score_tables({"FPO": [record(), record()]})) == 1


def test_win_rates_by_temperature_join_what_differs_in_it_alone():
    runs = {
        name: [record(50 + gain + 10 * t, t) for t in (0.9, 0.1, 0.5)]
        for name, gain in (("FPO", 5), ("DPO", 0))
    }
    other_judge = {"judge": {"model": "judge-2", "revision": "r1"}}
    runs["FPO"].append(record(70.0, 0.1, key=other_judge))  # one temperature makes no curve
    frame = win_rates(runs)
    assert frame["temperature"].to_list() == sorted(frame["temperature"].to_list())
    assert frame.height == 12
    assert frame["key"].n_unique() == 1
    assert not win_rates({"FPO": [record()], "DPO": [record()]}).height
    assert win_rates({}).height == 0


def test_the_chart_and_the_tables_say_how_many_were_judged():
    names = [run.name for run in example_comparison().runs]
    runs = {name: [record(50 + 4 * n + t, t, 650 + n) for t in (0.1, 0.7)]
            for n, name in enumerate(names)}  # fmt: skip
    report = example_comparison(
        scores=score_tables(runs), rates=win_rates(runs), no_curves={"kl": "", "discrepancy": ""}
    )
    drawn = draw(report)
    assert len(drawn.rates) == 2  # the win rate and the length-controlled one
    assert "650 of 805" in drawn.rates[0].figure.caption
    assert all(tag in drawn.rates[0].figure.svg for tag in Style(names).tags.values())
    shown = [table for table in tables(report) if table.name.startswith("scores_")]
    assert [table.name for table in shown] == ["scores_1", "scores_2"]
    for table in shown:
        assert table.columns[-1] == "Judged of asked"
        assert [row[-1].value for row in table.rows] == [
            f"{650 + n} of 805" for n in range(len(names))
        ]
        assert "revision r1" in table.note
    assert shown[0].rows[0][1].interval == "47.1 to 53.1"
    assert math.isclose(shown[0].data["value"][0], 50.1)
