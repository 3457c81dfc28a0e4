"""``fpo bench``: the table of packs, a pull from a server on loopback, what a check says."""

import json

import pytest

from fpo_core.bench import pull
from fpo_core.bench.pack import packs_folder
from tests.fpo_core.packs import arena_folder
from tests.fpo_core.test_pull import serving, sourced


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))


def test_the_packs_are_listed_with_what_is_not_pinned(fpo):
    result = fpo("bench", "list")
    assert result.code == 0, result.err
    for name in ("alpaca-eval-2", "arena-hard-v0.1", "ifeval", "mt-bench"):
        assert name in result.out
    known = {pack["name"]: pack for pack in json.loads(fpo("bench", "list", "--json").out)}
    assert known["arena-hard-v0.1"]["files"]["judge"]["sha256"] is None
    assert not known["mt-bench"]["pulled"]


def test_a_pack_is_pulled_and_checked_by_name(fpo, tmp_path, monkeypatch):
    contents = {file.name: file.read_bytes() for file in arena_folder(tmp_path / "a").iterdir()}
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    with serving(files) as (address, _):
        known = sourced(address, contents, unpinned=("judge",))
        monkeypatch.setitem(pull.KNOWN_PACKS, "served", known)
        result = fpo("bench", "pull", "served")
    assert result.code == 0, result.err
    assert f"fetching {address}/question.jsonl" in result.err
    assert "fetched 3 files, kept 0" in result.out
    assert "judge: had no pinned sha256" in result.out
    again = json.loads(fpo("bench", "pull", "served", "--json").out)
    assert (again["fetched"], len(again["kept"])) == ([], 3)
    checked = fpo("bench", "check", "served")
    assert checked.code == 0
    assert f"digest {again['pack']['digest']}" in checked.out
    assert json.loads(fpo("bench", "check", "served", "--json").out) == again["pack"]
    (packs_folder() / "served" / "question.jsonl").write_text('{"uid": "a"}\n')
    broken = fpo("bench", "check", "served")
    assert broken.code == 1
    assert "its sha256 is" in broken.err


def test_mistakes_are_told(fpo, tmp_path):
    result = fpo("bench", "pull", "arena")
    assert (result.code, "no pack 'arena' is known; there are" in result.err) == (2, True)
    folder = arena_folder(tmp_path / "a")
    (folder / "question.jsonl").write_text('{"uid": "a"\n')
    result = fpo("bench", "check", folder)
    assert result.code == 1
    assert f"{folder / 'question.jsonl'}, line 1: not JSON" in result.err
