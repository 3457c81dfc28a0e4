"""Grids and presets: the cells they come to, and what is refused before anything runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpo_core.errors import RecipeError
from fpo_core.recipe import load_recipe
from fpo_core.recipe.sweep import (
    cells_of_grid,
    cells_of_preset,
    load_preset,
    parse_grid,
    preset_names,
)

SCALARS = st.one_of(
    st.integers(-9, 9), st.booleans(), st.floats(0.01, 100).map(lambda x: round(x, 3))
)


@given(st.lists(SCALARS, min_size=1, max_size=5))
def test_an_axis_reads_its_values_as_yaml(values):
    text = ",".join(str(value).lower() for value in values)
    assert parse_grid([f" train.alpha = {text}"]) == {"train.alpha": values}


def test_values_may_be_lists_and_numbers_with_exponents():
    assert parse_grid(["train.lr=5e-7,1e-6", "sae.also=[],[{layer: 3}]"]) == {
        "train.lr": [5e-7, 1e-6],
        "sae.also": [[], [{"layer": 3}]],
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["train.alpha"], "write key.path=value,value"),
        (["train.alpha="], "write key.path=value,value"),
        (["=1"], "write key.path=value,value"),
        (["train.alpha=1", "train.alpha=2"], "train.alpha is given twice"),
        (["train.alpha=[1"], "not YAML"),
    ],
)
def test_an_axis_that_is_none_is_refused(axes, message):
    with pytest.raises(RecipeError, match=message):
        parse_grid(axes)


def test_every_combination_is_a_cell_whose_overrides_make_its_recipe():
    grid = {"train.method": ["dpo", "tdpo2", "fpo"], "train.alpha": [0.1, 0.5], "train.seed": [3]}
    cells = cells_of_grid("quickstart", ["train.lr=1e-5"], grid)
    assert [cell.name for cell in cells] == [
        "method dpo, seed 3", "method dpo, seed 3",  # no alpha to vary
        "method tdpo2, alpha 0.1, seed 3", "method tdpo2, alpha 0.5, seed 3",
        "method fpo, alpha 0.1, seed 3", "method fpo, alpha 0.5, seed 3",
    ]  # fmt: skip
    for cell in cells:
        assert load_recipe("quickstart", cell.overrides) == cell.recipe
        assert (cell.recipe.train.lr, cell.recipe.train.seed) == (1e-5, 3)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"train.alhpa": [1]}, "cell alhpa 1: .*unknown key 'train.alhpa'; did you mean 'alpha'"),
        ({"train.method": ["dpo", "fop"]}, "cell method fop: .*unknown objective; did you mean"),
        ({"train.alpha": [0.1, -1]}, "cell alpha -1: .*at least 0"),
    ],
)
def test_a_cell_that_is_no_recipe_is_named(grid, message):
    with pytest.raises(RecipeError, match=message):
        cells_of_grid("quickstart", [], grid)


@pytest.mark.parametrize("name", preset_names())
def test_the_papers_sweeps_are_valid_on_gemma2b(name):
    preset = load_preset(name)
    cells = cells_of_preset("gemma2b", [], preset)
    assert len({cell.name for cell in cells}) == len(cells) > 1
    assert len({cell.recipe.model_dump_json() for cell in cells}) == len(cells)
    if preset.of:
        with pytest.raises(RecipeError, match="names SAEs of gemma2b"):
            cells_of_preset("quickstart", [], preset)


def test_the_layers_of_table_3_and_the_alphas():
    cells = cells_of_preset("gemma2b", [], load_preset("layers"))
    places = {(cell.recipe.sae.layer, cell.recipe.sae.site) for cell in cells}
    assert places == {(n, s) for n in (7, 13, 19, 25) for s in ("resid_post", "mlp_out")}
    cells = cells_of_preset("gemma2b", [], load_preset("alpha"))
    found = {(cell.recipe.train.alpha, cell.recipe.train.stop_gradient) for cell in cells}
    assert found == {(a, s) for a in (0.1, 0.5, 1.0, 2.0) for s in (True, False)}


def test_a_preset_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("title: Mine\ncells:\n- {name: low, set: {train.beta: 0.05}}\n")
    (cell,) = cells_of_preset("quickstart", [], load_preset(str(path)))
    assert (cell.name, cell.recipe.train.beta) == ("low", 0.05)
    for text, message in (("title: Mine\n", "give a grid, or cells"), ("a: [", "mine.yaml")):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_preset(str(path))
    with pytest.raises(RecipeError, match="Sweeps: alpha, layers, methods"):
        load_preset("method")
