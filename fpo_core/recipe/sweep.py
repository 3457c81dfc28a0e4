"""Sweeps: a grid of settings over one recipe, and the grids of the paper's tables by name.

A cell is the recipe with some settings. A setting that the cell's objective does not have (DPO has
no alpha) is left out of it, so cells may come to the same: whoever runs them does so once.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError, model_validator

from fpo_core.errors import RecipeError
from fpo_core.recipe.base import Settings
from fpo_core.recipe.load import SHIPPED, load_recipe, parse_overrides
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.schema import Recipe
from fpo_core.recipe.yaml_text import read_yaml
from fpo_core.validation import explain

Values = Mapping[str, Any]  # by the recipe's key, "train.alpha"


class PresetCell(Settings):
    """A cell that no grid describes."""

    name: str
    set: dict[str, Any] = Field(description="settings, by key.path")


class Preset(Settings):
    """A sweep by name: one of the paper's tables."""

    title: str
    description: str = ""
    of: tuple[str, ...] = Field(default=(), description="recipes it is for; none named: any")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default={}, description="values by key.path; every combination is a cell"
    )
    cells: tuple[PresetCell, ...] = Field(default=(), description="instead of a grid")
    paper: tuple[str, ...] = Field(default=(), description="the paper's figures, for the report")

    @model_validator(mode="after")
    def _one_kind(self) -> "Preset":
        if bool(self.grid) == bool(self.cells):
            raise ValueError("give a grid, or cells")
        return self


class Cell(NamedTuple):
    """One combination of a sweep."""

    name: str
    settings: dict[str, Any]  # on top of the recipe, by key
    recipe: Recipe

    @property
    def overrides(self) -> list[str]:
        """The settings as ``key.path=value``."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]


def preset_names() -> list[str]:
    """The sweeps that come with the project."""
    return sorted(path.stem for path in (SHIPPED / "sweeps").glob("*.yaml"))


def load_preset(name: str) -> Preset:
    """A shipped sweep, or the YAML file of one.

    Raises:
        RecipeError: there is none of that name, or its file is not valid.
    """
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if is_file else SHIPPED / "sweeps" / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(
            f"unknown sweep {name!r}. Sweeps: {', '.join(preset_names())}; or give the path of a "
            f".yaml file"
        )
    try:
        return Preset.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise RecipeError(f"sweep {path.name}: {explain(error, Preset)}") from error
    except RecipeError as error:
        raise RecipeError(f"sweep {path.name}: {error}") from error


def parse_grid(axes: Iterable[str]) -> dict[str, list[Any]]:
    """``["train.alpha=0.1,0.5"]`` as ``{"train.alpha": [0.1, 0.5]}``; values are read as YAML.

    Raises:
        RecipeError: naming the axis that has no values, is there twice, or is not YAML.
    """
    grid: dict[str, list[Any]] = {}
    for axis in axes:
        key, equals, values = axis.partition("=")
        key = key.strip()
        if not equals or not key or not values.strip():
            raise RecipeError(f"--grid {axis!r}: write key.path=value,value: train.alpha=0.1,0.5")
        if key in grid:
            raise RecipeError(f"--grid {key} is given twice; write all its values after one =")
        (found,) = parse_overrides([f"{key}=[{values}]"]).values()
        grid[key] = list(found)
    return grid


def cells_of_grid(name: str, overrides: Sequence[str], grid: Mapping[str, list[Any]]) -> list[Cell]:
    """Every combination of a grid, each a checked recipe.

    Args:
        name: the recipe's.
        overrides: ``key.path=value`` settings of all cells.
        grid: values by key.

    Raises:
        RecipeError: naming the cell whose settings no recipe has.
    """
    combinations = itertools.product(*grid.values())
    return [
        _cell(name, overrides, dict(zip(grid, values, strict=True)), None)
        for values in combinations
    ]


def cells_of_preset(name: str, overrides: Sequence[str], preset: Preset) -> list[Cell]:
    """The cells of a preset; as ``cells_of_grid``.

    Raises:
        RecipeError: the preset is for other recipes, or a cell is not valid.
    """
    if preset.of and name not in preset.of:
        raise RecipeError(
            f"the sweep {preset.title!r} names SAEs of {' and '.join(preset.of)}, the recipe is "
            f"{name!r}: take one of these, or write a sweep with its SAEs (docs/sweeps.md)"
        )
    if preset.grid:
        return cells_of_grid(name, overrides, preset.grid)
    return [_cell(name, overrides, dict(one.set), one.name) for one in preset.cells]


def _cell(name: str, overrides: Sequence[str], settings: Values, called: str | None) -> Cell:
    common = parse_overrides(overrides)
    method = settings.get("train.method", common.get("train.method"))
    if method is None:
        method = load_recipe(name).train.method
    own = {key: value for key, value in settings.items() if _applies(key, method)}
    title = called or ", ".join(f"{_last(key)} {_shown(value)}" for key, value in own.items())
    try:
        recipe = load_recipe(name, {**common, **own})
    except RecipeError as error:
        raise RecipeError(f"cell {title}: {error}") from error
    return Cell(title, {**common, **own}, recipe)


def _applies(key: str, method: Any) -> bool:
    """Whether an objective has a setting; one that is not known is for the recipe to refuse."""
    found = METHODS.get(str(method))
    if found is None:
        return True
    if key == "train.alpha":
        return found.alpha is not None
    if key == "train.gamma":
        return found.gamma is not None
    return key != "train.stop_gradient" or found.constraint is not None


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
