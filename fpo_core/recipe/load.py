"""Read a recipe: YAML, inheritance (``base:``), ``key.path=value`` overrides, and clear errors."""

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fpo_core.errors import RecipeError
from fpo_core.recipe.schema import Recipe
from fpo_core.recipe.yaml_text import read_yaml
from fpo_core.validation import explain, nearest

# The checkout's recipes/, beside the packages (the project is installed in place).
SHIPPED = Path(str(files("fpo_core"))).parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe given by name (``quickstart``) or by path (``my/recipe.yaml``).

    Raises:
        RecipeError: naming the recipes there are and the nearest.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(f"recipe file {name!r} does not exist")
        return path
    path = SHIPPED / f"{name}.yaml"
    if "/" in name or not path.is_file():
        raise RecipeError(
            f"unknown recipe {name!r}{nearest(name, shipped_recipes())} Recipes: "
            f"{', '.join(shipped_recipes())}; or give the path of a .yaml file"
        )
    return path


def load_recipe(name: str, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        name: shipped recipe or path of a YAML file.
        overrides: ``key.path=value`` strings (values are YAML), or a mapping of the same.

    Raises:
        RecipeError: naming the file or override, the key, and what is allowed.
    """
    path = find_recipe(name)
    values = _read_with_bases(path, ())
    given = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    for key, value in given.items():
        _set(values, key, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"recipe {path.name}: {explain(error, Recipe)}") from error


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["train.alpha=1.0"]`` as ``{"train.alpha": 1.0}``; values are read as YAML."""
    parsed: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {text!r}: write key.path=value, such as train.alpha=1.0")
        try:
            parsed[key.strip()] = _numbers(read_yaml(value))
        except RecipeError as error:
            raise RecipeError(f"--set {text[:200]!r}: the value is wrong: {error}") from error
    return parsed


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise RecipeError(f"recipe {path.name}: `base` goes in a circle")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 text ({error.reason})") from error
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe {path}: a recipe is a mapping of sections (model, data, sae, ...)"
        )
    values = _numbers(values)
    base = values.pop("base", None)
    if base is None:
        return values
    sibling = path.parent / f"{base}.yaml"
    base_path = sibling if sibling.is_file() else find_recipe(str(base))
    return _merge(_read_with_bases(base_path, (*seen, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None:
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {key}: {section!r} is a value, not a section")
        values = inner
    values[last] = value


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads ``5e-7`` as text; people mean the number."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    if isinstance(value, str) and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value
