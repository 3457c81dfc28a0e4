"""The flows by a name that nothing hides, for deployments: ``fpo_core.deployed.fpo_pipeline``.

A worker imports a flow with the folder it runs in first on the path, where a ``flows.py`` would be
taken for our package. The flows are named by text: ``fpo_core`` itself knows no orchestrator.
"""

import importlib
from typing import Any

_MODULES = ("flows.pipeline", "flows.stages", "flows.ablation")


def __getattr__(name: str) -> Any:
    """Return the flow of this name."""
    if name.startswith("fpo_"):
        for module in map(importlib.import_module, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"no flow {name!r} in {', '.join(_MODULES)}")
