"""Run flows from a terminal: in this process, or on a Prefect server where one is configured.

Prefect's temporary server takes longer to start and stop than a short run takes to work. A run that
nobody watches in its UI gains nothing from it, so stages are then plain calls.
"""

import atexit
import functools
import logging
import signal
import subprocess
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Required, TypedDict

from prefect.settings import PREFECT_API_URL

from flows.pipeline import fpo_pipeline, run_prepared
from fpo_core.errors import Terminated
from fpo_core.processes import end_with_parent
from tasks.run import Outcome, PipelineRun

log = logging.getLogger("fpo.stage")

TERMINATED = 128 + signal.SIGTERM  # exit code, as of a shell


class Given(TypedDict, total=False):
    """Parameters of ``fpo_pipeline`` that a run was prepared from."""

    recipe: Required[str]
    overrides: list[str]
    from_stage: str | None
    only_stage: str | None
    force: bool
    store: str | None


def run_pipeline(
    run: PipelineRun, stages: Sequence[str], report_folder: str | None, given: Given
) -> dict[str, Outcome]:
    """Run a prepared pipeline, as a flow run where a server is configured or Ray needs one.

    Args:
        run: the pipeline run.
        stages: their names, as planned.
        report_folder: where the report goes; ``reports/RECIPE-METHOD`` by default.
        given: the flow's parameters that the run was prepared from.
    """
    if has_server() or run.recipe.resources.inference.runner == "ray":
        with contained_prefect_server():
            return fpo_pipeline(**given, report_folder=report_folder)
    with terminable():
        return run_prepared(run, stages, report_folder)


def has_server() -> bool:
    """Return whether ``PREFECT_API_URL`` or the active profile names a server."""
    return PREFECT_API_URL.value() is not None


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM save what runs within, then leave with exit code 143."""
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except Terminated:
        log.warning("stopped by SIGTERM. Finished work is saved. Run the same command to resume.")
        raise SystemExit(TERMINATED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(_number: int, _frame: types.FrameType | None) -> None:
    raise Terminated


@contextmanager
def contained_prefect_server() -> Iterator[None]:
    """Have Prefect start its server in a session of its own, tied to the life of this process.

    As Prefect starts it, Ctrl-C in a terminal ends the server before the run, which then waits for
    it in vain; and a run that is killed leaves it behind. Prefect has no setting for either. Where
    a server is configured, Prefect starts none, and this changes nothing.
    """
    from prefect.server.api import server

    popen = functools.partial(
        subprocess.Popen, start_new_session=True, preexec_fn=end_with_parent()
    )
    server.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": popen})  # pyright: ignore[reportAttributeAccessIssue, reportPrivateImportUsage]
    try:
        yield
    finally:
        # All is done, and the server takes a moment to end: Ctrl-C would only break into that.
        # Registered last, so this comes before Prefect's own step at exit.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
