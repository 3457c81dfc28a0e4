"""Tokens of a response that are not scored are shown, and marked as such."""

import numpy as np
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from explorer import open_store
from explorer.features import feature_view
from explorer.index import open_pair_index
from explorer.pairs import pair_list, pair_view
from explorer.web.app import make_app

RANGES = {"chosen_unscored": [1, 3], "rejected_unscored": [0, 1, 2, 3]}


class OfSeveralTurns:
    """The pairs with these ranges; None: as a table from before their columns."""

    def __init__(self, pairs, ranges):
        self._pairs, self._ranges = pairs, ranges

    def __getattr__(self, name):
        return getattr(self._pairs, name)

    def rows(self, table, shard, rows, columns):
        found = self._pairs.rows(table, shard, rows, columns)
        present = [name for name in RANGES if name in columns]
        if self._ranges is None:
            return found.drop_columns(present)
        for name in present:
            place, kind = found.column_names.index(name), found.schema.field(name)
            values = [self._ranges[name]] * len(found)
            found = found.set_column(place, kind, pa.array(values, kind.type))
        return found


@pytest.fixture
def opened(browsed):
    """Open the cache over pairs with other ranges than it was made with."""

    def open_with(ranges):
        cache = open_store(browsed).features("tiny")
        cache.pairs = OfSeveralTurns(cache.pairs, ranges)
        return cache, open_pair_index(cache)

    return open_with


def unscored(pieces):
    return [piece.position for piece in pieces if not piece.scored]


def test_a_pairs_tokens_say_whether_they_are_scored(opened):
    cache, index = opened(RANGES)
    pair_id = pair_list(cache, index, 0, 1)[0].pair_id
    view = pair_view(cache, index, pair_id)
    assert unscored(view.chosen) == [1, 2]
    assert unscored(view.rejected) == [0, 2]
    plain = pair_view(*opened(None), pair_id)
    for side in ("chosen", "rejected"):
        found, before = getattr(view, side), getattr(plain, side)
        assert [piece.text for piece in found] == [piece.text for piece in before]
        assert [piece.position for piece in found] == list(range(len(before)))
        assert unscored(before) == []


def test_so_do_those_beside_a_features_examples(opened):
    cache, index = opened(RANGES)
    strongest = int(np.argmax(cache.small_stats["max"].to_numpy()))
    for example in feature_view(cache, index, strongest, 4).examples:
        wanted = {"chosen": [1, 2], "rejected": [0, 2]}[example.side]
        shown = {piece.position for piece in example.pieces}
        assert unscored(example.pieces) == [place for place in wanted if place in shown]


def test_the_page_marks_them_and_says_what_the_mark_means(browsed, monkeypatch):
    store = open_store(browsed)
    cache = store.features("tiny")
    pair_id = pair_list(cache, open_pair_index(cache), 0, 1)[0].pair_id
    client = TestClient(make_app(store, frozenset({"testserver"}), None))
    address, mark = (
        f"/cache/{cache.artifact.version}/pair/{pair_id}",
        'unscored" title="not scored"',
    )
    page = client.get(address).text
    assert mark not in page
    assert "Tokens in this style" not in page
    real = store.features

    def of_several_turns(name):
        found = real(name)
        found.pairs = OfSeveralTurns(found.pairs, RANGES)
        return found

    monkeypatch.setattr(store, "features", of_several_turns)
    client = TestClient(make_app(store, frozenset({"testserver"}), None))
    page = client.get(address).text
    assert page.count(mark) == 4
    assert page.count("Tokens in this style") == 1
