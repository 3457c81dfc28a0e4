"""Pairs by their metadata: conditions, the list, features of some pairs, terminal and pages."""

import json
import math
import re
import shutil
from collections.abc import Callable

import httpx
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from playwright.sync_api import sync_playwright

from explorer import open_store
from explorer.index import open_pair_index
from explorer.metadata import matching_pairs, parse_conditions, restricted_stats
from explorer.pairs import pair_list, pair_view
from fpo_core.errors import UsageError
from tests.explorer.test_web import CHROMIUM, Site, accessible, needs_chromium
from tests.with_metadata import HOSTILE, METADATA, add_metadata

PAIRS = range(18)
KINDS = {name: kind for name, (kind, _) in METADATA.items()}


def value(column: str, number: int):
    return METADATA[column][1](number)


@pytest.fixture(scope="module")
def store(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with-metadata")
    shutil.copytree(finished_run.store, folder / "store")
    add_metadata(folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def cache(store):
    return open_store(store).features("tiny")


@pytest.fixture
def index(cache):
    return open_pair_index(cache)


@pytest.mark.parametrize(
    ("where", "meets"),
    [
        (["topic=maths"], lambda n: value("topic", n) == "maths"),
        (["topic!=maths"], lambda n: value("topic", n) != "maths"),
        (["topic="], lambda n: value("topic", n) is None),
        (["topic!="], lambda n: value("topic", n) is not None),
        ([f"topic={HOSTILE}"], lambda n: value("topic", n) == HOSTILE),
        (["topic=no such"], lambda _: False),
        (["turns=1"], lambda n: value("turns", n) == 1),
        (["turns >= 1", "turns<2"], lambda n: value("turns", n) == 1),
        (["score=0.5"], lambda n: value("score", n) == 0.5),
        (["score>1"], lambda n: (value("score", n) or 0) > 1),
        (["score<=0.75"], lambda n: value("score", n) is not None and n <= 6),
        (["score="], lambda n: n == 5),
        (["checked=TRUE"], lambda n: value("checked", n)),
        (
            ["checked!=true", "topic=code", "turns=0"],
            lambda n: not value("checked", n) and n % 4 == 1 and n % 3 == 0,
        ),
        ([], lambda _: True),
        (["", " "], lambda _: True),
    ],
)
def test_conditions_are_those_of_plain_python(cache, where, meets):
    found = matching_pairs(cache, parse_conditions(where, cache.metadata))
    assert found.tolist() == [number for number in PAIRS if meets(number)]


def test_nan_is_no_value_and_a_name_may_contain_a_sign(cache, monkeypatch):
    table = pa.table({"a": [1.0, math.nan, None], "a=b": ["x", "y", None]})
    monkeypatch.setattr(
        "explorer.metadata.table_columns", lambda _a, _t, names: [table.select(names)]
    )
    columns = {"a": pa.float64(), "a=b": pa.string()}
    for text, expected in (("a=", [1, 2]), ("a!=1", [1, 2]), ("a>0", [0]), ("a=b=y", [1])):
        assert matching_pairs(cache, parse_conditions([text], columns)).tolist() == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "subject=maths",
            "unknown metadata column in 'subject=maths'.*topic, turns, score, checked",
        ),
        ("topic", "unknown metadata column in 'topic'; write NAME=VALUE"),
        ("topic<maths", "column topic has no order; use = or !="),
        ("checked>true", "column checked has no order"),
        ("checked=yes", "column checked holds true and false only"),
        ("turns=1.5", "column turns holds whole numbers only"),
        ("turns=99999999999999999999", "column turns holds whole numbers only"),
        ("score>high", "column score holds numbers only"),
        ("score>", "column score holds numbers only"),
    ],
)
def test_mistakes_are_told(text, says):
    with pytest.raises(UsageError, match=says):
        parse_conditions([text], KINDS)


def test_pairs_without_metadata_have_nothing_to_filter_by(browsed):
    cache = open_store(browsed).features("tiny")
    assert cache.metadata == {}
    with pytest.raises(UsageError, match="no metadata columns.*data.metadata"):
        parse_conditions(["topic=maths"], cache.metadata)


def test_the_list_is_filtered_then_cut(cache, index):
    every = pair_list(cache, index, 0, 100)
    assert [row.metadata for row in every] == [
        {name: value(name, number) for name in METADATA} for number in PAIRS
    ]
    for numbers in (np.array([0, 4, 5, 9, 17]), np.array([11]), np.array([], dtype=int)):
        for offset in range(4):
            listed = pair_list(cache, index, offset, 2, numbers)
            assert listed == [every[n] for n in numbers[offset : offset + 2]]
    view = pair_view(cache, index, every[6].pair_id)
    assert view.metadata == every[6].metadata


def test_features_of_some_pairs_equal_plain_polars(cache, index):
    numbers = matching_pairs(cache, parse_conditions(["topic=code"], cache.metadata))
    found = restricted_stats(cache, index, numbers)
    pooled = cache.pooled().with_row_index("row").collect()
    mine = pooled.filter((pl.col("row") // 2).is_in(numbers)).explode("indices", "values")
    for side in ("chosen", "rejected"):
        expected = np.zeros(cache.sae.d_sae)
        for feature, total in (
            mine.filter(pl.col("side") == side)
            .group_by("indices")
            .agg(pl.col("values").cast(pl.Float64).sum())
            .iter_rows()
        ):
            expected[feature] = total / len(numbers)
        np.testing.assert_allclose(found[f"mean_{side}"].to_numpy(), expected, rtol=1e-6)
    assert found["density"].equals(cache.small_stats["density"])
    assert found["difference"].equals(
        (found["mean_chosen"] - found["mean_rejected"]).alias("difference")
    )
    none = restricted_stats(cache, index, np.array([], dtype=int))
    assert (none["mean_chosen"] == 0).all()
    # Of all pairs: the statistics of the cache, where responses store all that fires.
    whole = restricted_stats(cache, index, np.arange(18))
    if (pooled["cutoff"] == 0).all():
        np.testing.assert_allclose(
            whole["mean_chosen"].to_numpy(), cache.small_stats["mean_chosen"].to_numpy(), rtol=1e-5
        )


def test_the_terminal_filters_and_shows(fpo, store, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "220")

    def cache(*arguments: object):
        return fpo("cache", *arguments, "--store", store)

    rows = json.loads(
        cache("pairs", "tiny", "--where", "topic=maths", "--where", "score>=1", "--json").out
    )
    assert [row["score"] for row in rows] == [1.0, 1.5, 2.0]
    assert {row["topic"] for row in rows} == {"maths"}
    shown = cache("pairs", "tiny", "--where", "topic=", "-n", 2)
    assert "4 of 18 pairs, where topic=" in shown.out
    none = cache("pairs", "tiny", "--where", "topic=prose", "--parquet", tmp_path / "no.parquet")
    assert none.code == 0, none.err
    assert pl.read_parquet_schema(tmp_path / "no.parquet")["turns"] == pl.Int64
    pair = cache("pair", "tiny", rows[0]["pair_id"])
    assert re.search(r"topic +maths\n.*turns +2\n.*score +1\n.*checked +true\n", pair.out), pair.out
    features = cache("features", "tiny", "--where", "topic=maths", "-n", 3)
    assert "difference over 5 of 18 pairs, where topic=maths" in features.out
    wrong = cache("pairs", "tiny", "--where", "subject=maths")
    assert (wrong.code, "topic, turns, score, checked" in wrong.err) == (2, True)


@pytest.fixture(scope="module")
def site(store):
    site = Site(store)
    yield site
    site.stop()


@pytest.fixture
def get(site, cache) -> Callable[..., httpx.Response]:
    root = f"{site.url}/cache/{cache.artifact.version}"
    return lambda path, **query: httpx.get(f"{root}/{path}", params=query)


def test_the_page_filters_by_its_url(get):
    both = get("pairs", where=["topic=maths", "score>=1"])
    assert both.text.count("/pair/") == 3
    assert "3 of 18 pairs, 1 to 3" in both.text
    assert "18 pairs, 1 to 18" in get("pairs", where="").text
    assert "0 of 18 pairs" in get("pairs", where="topic=prose").text
    wrong = get("pairs", where="subject=maths")
    assert (wrong.status_code, "topic, turns, score, checked" in wrong.text) == (400, True)


def test_values_are_text_on_the_pages(get, cache, index):
    hostile = pair_list(cache, index, 2, 1)[0]
    for found in (
        get("pairs"),
        get(f"pair/{hostile.pair_id}"),
        get("pairs", where=f"topic={HOSTILE}"),
    ):
        assert found.status_code == 200
        assert HOSTILE not in found.text
        assert "&lt;script&gt;document.title=" in found.text


@needs_chromium
def test_a_filter_is_typed_added_to_and_kept_by_the_pages(site, cache, monkeypatch):
    monkeypatch.setattr("explorer.web.app.PAIRS", 2)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(base_url=site.url)
        page.goto(f"/cache/{cache.artifact.version}/pairs")
        accessible(page)
        page.get_by_label("where").fill("topic=maths")
        page.get_by_role("button", name="Show").click()
        page.get_by_label("and").last.fill("score>=0.5")
        page.get_by_role("button", name="Show").click()
        page.get_by_text("4 of 18 pairs, 1 to 2").wait_for()
        accessible(page)
        page.get_by_role("link", name="after").click()
        page.get_by_text("4 of 18 pairs, 3 to 4").wait_for()
        assert page.locator("tbody td:nth-child(3)").all_inner_texts() == ["maths"] * 2
        page.get_by_role("link", name="all pairs").click()
        page.get_by_text("18 pairs, 1 to 2").wait_for()
        page.locator("tbody a").first.click()
        page.locator("dl dt").get_by_text("topic").wait_for()
        accessible(page)
        browser.close()
