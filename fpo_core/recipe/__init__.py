"""Recipes: what a run computes, as typed and frozen settings read from YAML."""

from fpo_core.recipe.load import find_recipe, load_recipe, parse_overrides
from fpo_core.recipe.schema import Recipe

__all__ = ["Recipe", "find_recipe", "load_recipe", "parse_overrides"]
