"""The pull step of the deployments: where a worker's flow runs begin."""

import os
from pathlib import Path

from fpo_core.errors import FPOError
from fpo_core.own_names import ROOT


def enter() -> dict[str, str]:
    """Make the checkout the current folder, where recipes' relative paths begin.

    It is what ``FPO_CHECKOUT`` names to the worker, or where the project is installed from.
    Prefect's own step would keep the folder of the machine that deploys.

    Raises:
        FPOError: there is no such folder on this worker.
    """
    named = os.environ.get("FPO_CHECKOUT")
    folder = Path(named).expanduser() if named else ROOT
    if not folder.is_dir():
        raise FPOError(
            f"FPO_CHECKOUT={folder} is no folder on this worker: start it with the folder that "
            f"recipes' relative paths begin in, or without FPO_CHECKOUT"
        )
    os.chdir(folder)
    return {"directory": str(folder)}
