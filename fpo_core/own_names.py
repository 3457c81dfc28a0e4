"""Import our packages by their names, whatever else on the path has the same ones.

``storage``, ``tasks``, ``flows`` and ``cli`` are names that others use too. Python takes the first
match on ``sys.path``, and that is often not ours: Prefect runs a flow's hooks from its own
``prefect/runner/`` folder, which has a ``storage.py``, and a worker puts the folder that it runs in
before everything else. ``fpo_core`` claims the names as it is imported, and every process of ours
imports it first.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

OWN_NAMES = ("cli", "explorer", "flows", "storage", "tasks")
ROOT = Path(__file__).parents[1]


class _OwnPackages(MetaPathFinder):
    """Finds our packages next to this one; modules inside them are found as usual."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Return where one of our packages is, or None for any other module."""
        if fullname not in OWN_NAMES:
            return None
        folder = ROOT / fullname
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def claim() -> None:
    """Look for our packages next to this one, before ``sys.path`` is searched."""
    if not any(isinstance(finder, _OwnPackages) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OwnPackages())
