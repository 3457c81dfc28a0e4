"""What an artifact was made from, and what was made from it."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from storage.catalog import ArtifactInfo

_VERSION = re.compile(r"^[0-9a-f]{16}$")
_PREFIX = "artifact:"


class Node(NamedTuple):
    """One line of a lineage tree."""

    name: str  # stage/version, or what identifies something outside the store
    role: str  # as what its parent in the tree uses it; empty for the root
    state: str  # complete, partial, corrupt, missing (an artifact), or external
    branches: tuple["Node", ...]


def input_artifacts(inputs: Mapping[str, str]) -> dict[str, str]:
    """The inputs that are artifacts: role -> ``stage/version``.

    An input whose value is a version is the artifact of the input's name; ``artifact:`` before a
    ``stage/version`` names one of another name.
    """
    found = {}
    for role, value in inputs.items():
        if _VERSION.match(value):
            found[role] = f"{role}/{value}"
        elif value.startswith(_PREFIX):
            found[role] = value.removeprefix(_PREFIX)
    return found


def ancestors(name: str, infos: Iterable[ArtifactInfo]) -> Node:
    """The tree of what an artifact was made from, down to data and models."""
    known = {info.name: info for info in infos}

    def below(name: str) -> list[tuple[str, str]]:
        info = known.get(name)
        inputs = info.inputs if info and info.inputs else {}
        artifacts = input_artifacts(inputs)
        return [
            (role, artifacts.get(role) or f"{role}:{value.removeprefix(f'{role}:')}")
            for role, value in inputs.items()
        ]

    return _tree(name, "", known, below)


def descendants(name: str, infos: Iterable[ArtifactInfo]) -> Node:
    """The tree of what was made from an artifact."""
    known = {info.name: info for info in infos}
    users: dict[str, list[tuple[str, str]]] = {}
    for info in known.values():
        for role, source in input_artifacts(info.inputs or {}).items():
            users.setdefault(source, []).append((role, info.name))
    return _tree(name, "", known, lambda name: sorted(users.get(name, ())))


def reachable(names: Iterable[str], infos: Iterable[ArtifactInfo]) -> set[str]:
    """The artifacts that the named ones need, themselves included."""
    known = {info.name: info for info in infos}
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            info = known.get(name)
            waiting += input_artifacts(info.inputs or {}).values() if info else ()
    return found


def _tree(
    name: str,
    role: str,
    known: Mapping[str, ArtifactInfo],
    below: Callable[[str], list[tuple[str, str]]],
) -> Node:
    is_artifact = bool(re.fullmatch(r"[^:/]+/[0-9a-f]{16}", name))
    info = known.get(name)
    state = info.state if info else "missing" if is_artifact else "external"
    return Node(
        name, role, state,
        tuple(_tree(inner, as_what, known, below) for as_what, inner in below(name)),
    )  # fmt: skip
