"""Files follow the umask, whatever wrote them; YAML keys occur once."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fpo_core.errors import RecipeError
from fpo_core.files import follow_umask
from fpo_core.recipe import load_recipe
from storage.location import open_store


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_and_its_files_get_the_modes_that_the_umask_asks_for(umask, tmp_path):
    folder = tmp_path / "made"
    (folder / "inner").mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "inner" / "w.safetensors")
    (folder / "inner" / "w.safetensors").chmod(0o600)
    folder.chmod(0o700)
    follow_umask(folder)
    assert mode(folder) == mode(folder / "inner") == 0o777 & ~umask
    assert mode(folder / "inner" / "w.safetensors") == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [folder]


def test_a_private_file_that_is_put_into_a_store_is_as_open_as_the_others(umask, tmp_path):
    store = open_store(tmp_path / "store")
    weights = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2)}, weights)
    weights.chmod(0o600)
    store.backend.put_file("artifacts/policy/0123456789abcdef/data/w.safetensors", weights)
    (stored,) = (tmp_path / "store").rglob("w.safetensors")
    assert mode(stored) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {lr: 0.5}\ntrain: {alpha: 1}", r"'train' occurs twice, on lines \d+ and \d+"),
        ("train:\n  lr: 0.5\n  lr: 1", "'lr' occurs twice"),
        ("x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("data: {date: 2026-02-30}", "a value cannot be read"),
        ("x: [", "not YAML"),
    ],
)
def test_yaml_that_is_no_recipe_is_told_in_words(text, told, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(f"base: quickstart\nname: r\n{text}\n")
    with pytest.raises(RecipeError, match=told):
        load_recipe(str(path))


def test_merge_keys_are_no_duplicates(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text("base: quickstart\nname: m\ntrain: {<<: {lr: 1.0e-4, k: 4}, lr: 2.0e-4}\n")
    assert load_recipe(str(path)).train.lr == 2e-4
