"""The explorer's answers beside plain polars over the same tables, and hostile text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from explorer import open_store
from explorer.diff import _correlation, diff_caches, match_features
from explorer.errors import NotReadable, NotThere
from explorer.features import (
    FeatureQuery,
    feature_histogram,
    feature_table,
    feature_view,
    token_values,
)
from explorer.group import group_yaml
from explorer.index import open_feature_index, open_pair_index
from explorer.labels import Labels, copy_labels
from explorer.moved import policy_changes
from explorer.neuronpedia import page_of
from explorer.pairs import pair_list, pair_view
from explorer.text import LONGEST, Detokenizer, visible
from fpo_core.errors import UsageError
from fpo_core.recipe.training import TrainSettings


@pytest.fixture(scope="module")
def explored(browsed):
    return open_store(browsed)


@pytest.fixture(scope="module")
def cache(explored):
    return explored.features("tiny")


@pytest.fixture
def pairs(cache):
    return open_pair_index(cache)


@pytest.fixture
def index(cache):
    return open_feature_index(cache)


@pytest.fixture(scope="module")
def pooled(cache):
    """Row number, feature and value of all that is stored, by plain polars."""
    return cache.pooled().with_row_index("row").collect()


def test_a_cache_has_the_names_that_people_have_for_it(explored, cache):
    version = cache.artifact.version
    for name in (f"features/{version}", version, version[:6], "tiny"):
        assert explored.features(name).name == cache.name
    assert (cache.recipes, cache.n_pairs) == (("tiny",), 18)
    assert (cache.sae.layer, cache.sae.site) == (1, "resid_post")
    assert cache.detokenizer.note is None
    with pytest.raises(NotThere, match="no feature cache 'other'.*features/"):
        explored.features("other")
    pairs = cache.pairs.name
    with pytest.raises(NotReadable, match=f"{pairs} has no features"):
        explored.features(pairs)


def test_the_index_is_the_pooled_table_turned_round(cache, pairs, index, pooled):
    long = pooled.select("row", "indices", "values").explode(["indices", "values"])
    for feature in range(cache.sae.d_sae):
        expected = long.filter(pl.col("indices") == feature).sort("row")
        rows, values = index.entries(feature)
        np.testing.assert_array_equal(rows, expected["row"].to_numpy())
        np.testing.assert_array_equal(values, expected["values"].to_numpy())
    for number, pair_id in enumerate(pooled["pair_id"].to_list()[::2]):
        assert pairs.pair_number(pair_id) == number
        assert pairs.pair_id(number) == pair_id
    for absent in ("0" * 16, "no such", "f" * 40):
        with pytest.raises(NotThere, match="no pair"):
            pairs.pair_number(absent)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    sort=st.sampled_from(["difference", "change", "density", "mean", "max", "feature"]),
    descending=st.booleans(),
    low=st.floats(0, 1),
    high=st.floats(0, 1),
    offset=st.integers(0, 60),
)
def test_the_table_is_sorted_filtered_and_cut(cache, sort, descending, low, high, offset):
    low, high = sorted((low, high))
    page = feature_table(cache, FeatureQuery(sort, descending, low, high, "", offset, 7))
    every = cache.stats().collect().filter(pl.col("density").is_between(low, high))
    key = every["difference"].abs() if sort == "change" else every[sort]
    expected = sorted(
        zip(key.to_list(), every["feature"].to_list(), strict=True),
        key=lambda item: (-item[0] if descending else item[0], item[1]),
    )
    assert page.total == len(expected)
    assert page.rows["feature"].to_list() == [one for _, one in expected[offset : offset + 7]]


def test_a_query_that_is_none_is_refused(cache):
    with pytest.raises(UsageError, match="unknown order 'size'; one of difference"):
        feature_table(cache, FeatureQuery("size"))
    with pytest.raises(UsageError, match="min_density <= max_density"):
        feature_table(cache, FeatureQuery(min_density=0.5, max_density=0.1))


def test_a_features_page_says_what_the_tables_say(cache, pairs, index, pooled):
    feature = int(cache.small_stats.sort("max", descending=True)["feature"][0])
    view = feature_view(cache, pairs, feature, examples=4)
    assert view.stats["max"] == view.examples[0].value
    histogram = feature_histogram(cache, index, feature)
    assert histogram.chosen.sum() + histogram.without[0] == 18
    tokens = cache.tokens().collect()
    for example in view.examples:
        mine = tokens.filter((pl.col("pair_id") == example.pair_id)
                             & (pl.col("side") == example.side))  # fmt: skip
        for piece in example.pieces:
            (row,) = mine.filter(pl.col("position") == piece.position).to_dicts()
            stored = dict(zip(row["indices"], row["values"], strict=True))
            if piece.position != example.position:
                assert piece.value == stored.get(feature, 0.0)
            assert piece.text == cache.detokenizer.pieces([row["token_id"]])[0]
    row = 2 * pairs.pair_number(view.examples[0].pair_id)
    row += view.examples[0].side == "rejected"
    values = token_values(cache, pairs, row, feature)
    assert max(values.values()) == pytest.approx(view.examples[0].value)
    with pytest.raises(NotThere, match="features are 0 to 95"):
        feature_view(cache, pairs, 96)


def test_a_pairs_page_says_what_the_tables_say(cache, pairs, pooled):
    listed = pair_list(cache, pairs, 2, 3)
    assert [row.pair_id for row in listed] == pooled["pair_id"].to_list()[4:10:2]
    view = pair_view(cache, pairs, listed[0].pair_id, 3)
    assert len(view.chosen) == listed[0].chosen_tokens
    mine = pooled.filter(pl.col("pair_id") == listed[0].pair_id).to_dicts()
    sides = [dict(zip(row["indices"], row["values"], strict=True)) for row in mine]
    gaps = {one: sides[0].get(one, 0) - sides[1].get(one, 0) for one in {*sides[0], *sides[1]}}
    strongest = sorted(gaps, key=lambda one: (-abs(gaps[one]), one))[: len(view.differing)]
    assert [one.feature for one in view.differing] == strongest
    for one in view.differing:
        assert one.difference == pytest.approx(gaps[one.feature])


def test_a_cache_beside_itself_differs_in_nothing_and_matches_itself(cache, index):
    same = diff_caches(cache, cache)
    assert same["mean_change"].abs().max() == 0
    matched = match_features(cache, cache, index, index)
    fires = matched.filter(pl.col("correlation") > 0.5)
    assert fires.height
    assert fires["correlation"].to_list() == pytest.approx([1.0] * fires.height, abs=1e-4)


@pytest.mark.parametrize("block", [7, 100])
def test_correlations_of_features_are_numpys(cache, index, monkeypatch, block):
    monkeypatch.setattr("explorer.diff.BLOCK", block)
    features = np.array([3, 50, 57, 90])
    dense = np.zeros((len(features), 36))
    for place, feature in enumerate(features):
        rows, values = index.entries(int(feature))
        dense[place, rows] = values
    found = _correlation((index, index), (features, features), 36)
    varies = dense.std(1) > 0
    np.testing.assert_allclose(found[np.ix_(varies, varies)], np.corrcoef(dense[varies]), atol=1e-4)


def test_labels_are_kept_in_the_store_and_found(explored, cache, tmp_path):
    labels = Labels(explored.store, cache.sae)
    labels.set(7, "  money \n owed ")
    again = Labels(open_store(explored.store.url).store, cache.sae)
    assert (again.text(7), again.search("MONEY")) == ("money owed", {7})
    page = feature_table(cache, FeatureQuery(search="money"), again)
    assert page.rows.select("feature", "label").rows() == [(7, "money owed")]
    export = tmp_path / "export.jsonl"
    rows = [{"index": "7", "description": "theirs"}, {"index": "8", "description": "<b>bold</b>"}]
    export.write_text("\n".join(map(json.dumps, rows)))
    assert again.import_neuronpedia(export) == 1  # what was named by hand stays
    assert (again.text(7), again.text(8)) == ("money owed", "<b>bold</b>")
    again.set(7, "")
    assert again.text(7) == ""
    wrong = {
        "{": "not JSON",
        '[{"index": 1}]': "record 1: no `index`",
        '[{"index": 96, "description": ""}]': "96 is not in this SAE",
    }
    for content, message in wrong.items():
        export.write_text(content)
        with pytest.raises(NotReadable, match=message):
            again.import_neuronpedia(export)


def test_labels_come_along_to_another_store_whose_own_stay(explored, cache, tmp_path):
    here, there = Labels(explored.store, cache.sae), open_store(tmp_path / "other").store
    for feature, text in ((20, "twenty"), (21, "one more")):
        here.set(feature, text)
    Labels(there, cache.sae).set(20, "theirs")
    assert copy_labels(explored.store, there) == len(here) - 1
    found = Labels(there, cache.sae)
    assert (found.text(20), found.text(21)) == ("theirs", "one more")
    assert copy_labels(explored.store, there) == 0


@given(st.text())
def test_no_text_is_invisible_or_endless(text):
    shown = visible(text)
    assert len(shown) <= 10 * LONGEST
    assert not set(shown) & set("\u202e\u200b\u0000\u001b\ufeff\n\r\u2028")


def test_a_huge_token_and_a_missing_tokenizer():
    assert visible("x" * 100_000).endswith("… (+99,800)")
    none = Detokenizer(None, "not here")
    assert none.pieces([5, 6]) == ["⟨5⟩", "⟨6⟩"]


def test_damaged_labels_are_said(browsed, cache, tmp_path):
    shutil.copytree(browsed, tmp_path / "store")
    store = open_store(tmp_path / "store").store
    Labels(store, cache.sae).set(1, "one")
    (file,) = (tmp_path / "store").glob("labels/*.json")
    for content in ("{", "[]", '{"labels": {"x": {}}}'):
        file.write_text(content)
        with pytest.raises(NotReadable, match=f"labels/{file.name} of the store are damaged"):
            Labels(store, cache.sae)


def test_characters_of_several_tokens_are_joined_beside_broken_ones(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(
        vocab={one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
        merges=[],
    ))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    detokenizer = Detokenizer(tmp_path)
    broken = tokenizer.encode("é").ids[:1]
    ids = [*broken, *tokenizer.encode("漢a𓀀").ids]
    assert detokenizer.pieces(ids)[1:] == ["·", "·", "漢", "a", "·", "·", "·", "𓀀"]
    decoded: list[int] = []
    decode = detokenizer._decode
    monkeypatch.setattr(detokenizer, "_decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    detokenizer.pieces(broken * 5000)
    assert sum(decoded) < 15 * 5000  # of nothing but broken characters, it was quadratic


def test_an_unreadable_tokenizer_is_said_and_ids_are_shown(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    broken = Detokenizer(tmp_path)
    assert broken.note is not None
    assert "ids are shown" in broken.note
    assert broken.pieces([1]) == ["⟨1⟩"]


def test_a_newer_schema_is_refused(explored, browsed, tmp_path, monkeypatch):
    monkeypatch.setattr("explorer.store.SCHEMA_VERSIONS", {"features": 2})
    with pytest.raises(NotReadable, match="has schema 3, this program reads up to 2: update it"):
        explored.features("tiny")


def test_an_unfinished_cache_is_said(browsed, tmp_path):
    shutil.copytree(browsed, tmp_path / "store")
    (manifest,) = (tmp_path / "store").glob("artifacts/features/*/manifest.json")
    manifest.unlink()
    version = manifest.parent.name
    with pytest.raises(NotReadable, match=f"features/{version} is partial: run its recipe again"):
        open_store(tmp_path / "store").features(version)


def test_a_group_is_what_a_recipe_takes():
    text = group_yaml([9, 3, 3], "style", 0.5)
    (group,) = TrainSettings.model_validate(yaml.safe_load(text)["train"]).groups
    assert (group.name, group.features, group.weight) == ("style", (3, 9), 0.5)
    for features, name in (([], "a"), ([1], "No Good")):
        with pytest.raises(UsageError):
            group_yaml(features, name)


def test_neuronpedias_pages_are_those_of_released_saes():
    canonical = "gemma-scope-2b-pt-res-canonical:layer_25/width_16k/canonical"
    assert page_of(canonical, 7) == "https://www.neuronpedia.org/gemma-2-2b/25-gemmascope-res-16k/7"
    by_l0 = "gemma-scope-2b-pt-res:layer_25/width_16k/average_l0_116"
    assert page_of(by_l0, 7) == page_of(canonical, 7)
    for other in (None, "recipes/data/sae", "no-such-release:x"):
        assert page_of(other, 7) is None


def test_the_notebooks_lines_in_the_docs_run(browsed, capsys):
    text = (Path(__file__).parents[2] / "docs" / "explorer.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"fpo-store"', repr(str(browsed))).replace('"quickstart"', '"tiny"')
    exec(compile(code, "docs/explorer.md", "exec"), {})  # noqa: S102


def test_a_policy_is_named_or_refused(browsed, monkeypatch):
    store = open_store(browsed)
    cache = store.features("tiny")
    (info,) = [one for one in store.artifacts() if one.stage == "evaluation"]
    assert policy_changes(store, cache, "policy/").height
    other = info._replace(version="f" * 16, inputs={**info.inputs, "policy": "0" * 16})
    monkeypatch.setattr(store, "artifacts", lambda: [info, other])
    with pytest.raises(NotThere, match=rf"policy/{'0' * 16}, policy/{info.inputs['policy']}"):
        policy_changes(store, cache, "policy/")
    assert policy_changes(store, cache, f"policy/{info.inputs['policy'][:9]}").height
