"""A feature group, as text to paste into a recipe."""

import re
from collections.abc import Iterable

import yaml

from fpo_core.errors import UsageError

NAME = r"^[a-z0-9][a-z0-9._-]*$"  # as of train.groups in a recipe


def check_name(name: str) -> None:
    """Refuse a name that a recipe does not take.

    Raises:
        UsageError: it is none.
    """
    if not re.match(NAME, name) or len(name) > 64:
        raise UsageError(f"{name[:64]!r} is no name of a group: small letters, digits, . _ -")


def group_yaml(features: Iterable[int], name: str = "group", weight: float = 1.0) -> str:
    """The lines of a recipe that hold some features.

    Args:
        features: of the recipe's first SAE.
        name: of the group.
        weight: in the constraint; 0 measures the group only.

    Raises:
        UsageError: no features, or a name that a recipe does not take.
    """
    chosen = sorted(set(features))
    if not chosen:
        raise UsageError("a group has features; none was chosen")
    check_name(name)
    group = {"name": name, "features": chosen, "weight": weight}
    return yaml.safe_dump(
        {"train": {"groups": [group]}}, sort_keys=False, default_flow_style=None, width=100
    )
