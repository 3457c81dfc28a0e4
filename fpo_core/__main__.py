"""Start one of our programs where its name could be hidden: ``python -m fpo_core flows.cell``.

``python -m flows.cell`` would take a ``flows.py`` of the folder it is started in, and the ``fpo``
command a ``cli.py`` of ``PYTHONPATH``. ``fpo_core`` is no name that others use.
"""

import importlib
import runpy
import sys


def fpo() -> int | None:
    """Run the ``fpo`` command."""
    return importlib.import_module("cli.main").main()


if __name__ == "__main__":
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
