"""A run whose pairs have metadata: the evaluation by group, and the report that shows it."""

import json
import shutil
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest

from storage.schemas import EVALUATION_BREAKDOWN
from tests.with_metadata import HOSTILE, METADATA, add_metadata


@pytest.fixture(scope="module")
def evaluated(finished_run, tmp_path_factory) -> Path:
    """Folder of a store and a report, both with metadata."""
    from cli.main import main

    folder = tmp_path_factory.mktemp("metadata")
    shutil.copytree(finished_run.store, folder / "store")
    add_metadata(folder / "store")
    with pytest.raises(SystemExit) as left:
        main(
            [
                "run",
                str(finished_run.recipe),
                "--store",
                str(folder / "store"),
                "--report",
                str(folder / "report"),
            ]
        )
    assert not left.value.code
    return folder


def evaluation(store: Path) -> Path:
    (found,) = store.glob("artifacts/evaluation/*/data")
    return found


def test_the_table_of_pairs_has_their_metadata(evaluated):
    (pairs,) = (evaluated / "store").glob("artifacts/pairs/*/data")
    heldout = pl.read_parquet(pairs / "*.parquet").filter(pl.col("split") == "heldout")
    measured = pl.read_parquet(evaluation(evaluated / "store") / "pairs.parquet")
    assert measured["pair_id"].to_list() == heldout["pair_id"].to_list()
    for name in METADATA:
        mine = "row_kl_chosen" if name == "kl_chosen" else name
        assert measured[mine].equals(heldout[name].alias(mine))
    assert measured["kl_chosen"].dtype == pl.Float64


def test_the_breakdown_agrees_with_the_pairs_and_its_schema(evaluated):
    folder = evaluation(evaluated / "store")
    assert pq.read_schema(folder / "breakdown.parquet").equals(EVALUATION_BREAKDOWN)
    found = pl.read_parquet(folder / "breakdown.parquet")
    assert found["column"].unique(maintain_order=True).to_list() == list(METADATA)
    by_topic = found.filter(pl.col("column") == "topic", pl.col("metric") == "kl_chosen")
    expected = (
        pl.read_parquet(folder / "pairs.parquet")
        .group_by(group=pl.col("topic").fill_null("null"))
        .agg(pl.len().cast(pl.Int32).alias("pairs"), pl.col("kl_chosen").mean().alias("policy"))
    )
    joined = by_topic.join(expected, on=["group", "pairs"], validate="1:1")
    assert joined.height == by_topic.height == expected.height
    assert joined["policy"].to_list() == pytest.approx(joined["policy_right"].to_list())
    metrics = {one["key"] for one in json.loads((folder / "metrics.json").read_text())}
    assert set(found["metric"]) == metrics - {"entropy", "answer_length"}


def test_the_report_has_a_section_per_column(evaluated):
    html = (evaluated / "report" / "report.html").read_text()
    for name in METADATA:
        assert f"Results by {name}</h2>" in html
    assert HOSTILE not in html
    assert (evaluated / "report" / "charts" / "results_by_1.png").is_file()


def test_without_metadata_the_evaluation_is_as_before(finished_run):
    folder = evaluation(finished_run.store)
    assert {path.name for path in folder.iterdir()} == {
        "answers.parquet",
        "audit.parquet",
        "features.parquet",
        "groups.parquet",
        "metrics.json",
        "pairs.parquet",
    }
    columns = pl.read_parquet_schema(folder / "pairs.parquet")
    assert all(name == "pair_id" or name.endswith(("_chosen", "_rejected")) for name in columns)
    assert "Results by" not in finished_run.report.joinpath("report.html").read_text()
