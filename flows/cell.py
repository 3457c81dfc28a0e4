"""One cell of a sweep, in its own process: ``python -m fpo_core flows.cell``, the job on stdin.

A cell that runs out of memory or is killed does not take the sweep along, and training's workers
have a main thread above them whose signals are theirs alone.
"""

import json
import logging
import os
import signal
import sys
from typing import NamedTuple

from fpo_core.errors import FPOError
from fpo_core.quiet import set_quiet_defaults
from storage.errors import StoreError


class CellJob(NamedTuple):
    """What a cell's process has to know."""

    recipe: str
    overrides: list[str]
    store: str | None
    report_folder: str


def main() -> int:
    """Run the cell; 0 done, 1 failed, 130 interrupted."""
    set_quiet_defaults()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("fpo").setLevel(os.environ.get("FPO_LOG", "INFO").upper())
    signal.signal(signal.SIGTERM, _as_interrupt)
    job = CellJob(**json.load(sys.stdin))
    try:
        _run(job)
    except (FPOError, StoreError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(job: CellJob) -> None:
    from tasks.report import bring_report
    from tasks.run import prepare_run

    run, stages = prepare_run(job.recipe, job.overrides, job.store)
    outcomes = run.reuse(stages)
    if outcomes is not None:
        bring_report(run, job.report_folder, outcomes)
        return
    from flows.local import Given, run_pipeline

    given: Given = {"recipe": job.recipe, "overrides": job.overrides, "store": job.store}
    run_pipeline(run, stages, job.report_folder, given)


def _as_interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
