"""Read YAML as recipes are written: a key that occurs twice is a mistake, not the last one's."""

from collections.abc import Hashable
from typing import Any

import yaml

from fpo_core.errors import RecipeError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:  # `<<` has no value of its own
                continue
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable):
                if key in seen:
                    raise RecipeError(
                        f"the key {key!r} occurs twice, on lines {seen[key]} and {line}. Put both "
                        f"under one, or remove one"
                    )
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(text: str) -> Any:
    """Return what a YAML text says.

    Raises:
        RecipeError: not YAML, a date that does not exist, a key that occurs twice, or nested too
            deeply.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
    except RecursionError as error:
        raise RecipeError("nested too deeply; a recipe has sections and settings") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML ({' '.join(str(error).split())})") from error
    except ValueError as error:  # of `2026-02-30`, which YAML reads as a date
        raise RecipeError(f"not YAML: a value cannot be read ({error})") from error
