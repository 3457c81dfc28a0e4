"""``fpo-ablation``: a sweep's cells over shared caches, and one comparison of them at the end."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from threading import Lock
from typing import Annotated, NamedTuple

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from pydantic import Field

from flows.cell import CellJob
from flows.parameters import Overrides, RecipeName, StoreUrl, run_name
from flows.pools import end_of_taken_over
from fpo_core.errors import FPOError
from fpo_core.processes import end_with_parent
from tasks.compare import compare_runs, write_comparison
from tasks.sweep import PlannedCell, Sweep, plan_sweep

log = logging.getLogger("fpo.sweep")

Grid = list[Annotated[str, Field(examples=["train.alpha=0.1,0.5"])]]
SHOWN_LINES = 12  # of a failed cell's last words


class CellOutcome(NamedTuple):
    """What became of a cell."""

    cell: str
    evaluation: str
    seconds: float
    failure: str | None


@flow(name="fpo-ablation", flow_run_name=run_name)
def fpo_ablation(
    recipe: RecipeName,
    grid: Grid = [],  # noqa: B006  Prefect copies it, and its form shows a list
    preset: str | None = None,
    overrides: Overrides = [],  # noqa: B006
    parallel: Annotated[int, Field(ge=1)] = 1,
    store: StoreUrl = None,
    report_folder: str | None = None,
) -> list[CellOutcome]:
    """Run every cell of a grid; what cells share, and what exists already, is computed once.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file as the worker sees it.
        grid: axes, each ``key.path=value,value``: ``train.alpha=0.1,0.5``.
        preset: a sweep by name instead: methods, alpha, layers, saes or normalization.
        overrides: settings of all cells, each ``key.path=value``.
        parallel: cells at a time.
        store: a folder or ``s3://bucket/prefix``; where left out, the worker's ``FPO_STORE``, or
            the recipe's.
        report_folder: where the comparison and the cells' reports go; ``reports/sweep-RECIPE``
            where left out.
    """
    if (ended := end_of_taken_over()) is not None:
        return ended
    sweep = plan_sweep(recipe, overrides, grid, preset, store)
    folder = Path(report_folder or f"reports/sweep-{sweep.cells[0].cell.recipe.name}")
    outcomes = run_cells(sweep, recipe, store, parallel, folder)
    report_sweep(sweep, outcomes, folder)
    return outcomes


def run_cells(
    sweep: Sweep, recipe: str, store: str | None, parallel: int, folder: Path
) -> list[CellOutcome]:
    """Run the cells, so many at a time, each in a process of its own.

    Args:
        sweep: the planned sweep.
        recipe: the recipe's name or file.
        store: its store, as given.
        parallel: cells at a time; those that need the same artifact wait for who makes it.
        folder: receives each cell's report.
    """
    total = len(sweep.cells)
    # In this order an error first ends the processes, and then waits for the threads.
    with ThreadPoolExecutor(parallel) as pool, _processes(parallel) as processes:

        def run(number: int) -> CellOutcome:
            one = sweep.cells[number]
            job = CellJob(recipe, one.cell.overrides, store, str(folder / _slug(one.cell.name)))
            log.info("cell %d of %d: %s", number + 1, total, one.cell.name)
            return processes.run(one, job)

        # With the flow run's context, by which its log lines find it.
        threads = [pool.submit(copy_context().run, run, number) for number in range(total)]
        return [thread.result() for thread in threads]


def report_sweep(sweep: Sweep, outcomes: Sequence[CellOutcome], folder: Path) -> None:
    """Compare the cells that came to their end, and say which did not.

    Raises:
        FPOError: cells that failed, each with its reason; the others are done and compared.
    """
    done = [one.evaluation for one in outcomes if one.failure is None]
    if len(done) > 1:
        compared = compare_runs(sweep.store, done)
        report = compared.report
        notes = (*report.notes, *(f"The paper: {line}" for line in sweep.paper))
        compared = compared.with_report(title=f"{sweep.title}: {len(done)} runs", notes=notes)
        log.info("comparison %s", write_comparison(compared, folder))
    failed = [one for one in outcomes if one.failure is not None]
    if failed:
        reasons = "\n".join(f"  {one.cell}: {one.failure}" for one in failed)
        raise FPOError(
            f"{len(failed)} of {len(outcomes)} cells failed; the same command goes on with them:\n"
            f"{reasons}"
        )


class _Processes:
    """The cells' processes that are at work; they go with the sweep."""

    def __init__(self, parallel: int) -> None:
        self._lock, self._running, self._ending = Lock(), set[subprocess.Popen[str]](), False
        # More threads than cores wait for each other in a loop.
        cores = max(1, (os.cpu_count() or 1) // parallel)
        self._threads = {"OMP_NUM_THREADS": str(cores)} if parallel > 1 else {}

    def run(self, one: PlannedCell, job: CellJob) -> CellOutcome:
        """Run a cell to its end; its log lines come out behind its name."""
        started = time.monotonic()
        process = self._start(job)
        last: list[str] = []
        if process is not None:
            assert process.stderr is not None
            with process.stderr as lines:
                for line in lines:
                    last = [*last[-SHOWN_LINES:], line.rstrip()]
                    log.info("[%s] %s", one.cell.name, line.rstrip())
            with self._lock:
                self._running.discard(process)
        code = process.wait() if process else 130
        failure = _failure(code, last)
        seconds = time.monotonic() - started
        if failure:
            log.warning("cell %s failed: %s", one.cell.name, failure)
        return CellOutcome(one.cell.name, one.evaluation, seconds, failure)

    def _start(self, job: CellJob) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._ending:
                return None
            process = subprocess.Popen(
                [sys.executable, "-m", "fpo_core", "flows.cell"], stdin=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent(),
                env={**self._threads, **os.environ, **_same_server()},
            )  # fmt: skip
            self._running.add(process)
        assert process.stdin is not None
        process.stdin.write(json.dumps(job._asdict()))
        process.stdin.close()
        return process

    def end(self) -> None:
        """Ask those at work to save themselves and stop; none is started any more."""
        with self._lock:
            self._ending = True
            for process in self._running:
                process.terminate()


@contextmanager
def _processes(parallel: int) -> Iterator[_Processes]:
    processes = _Processes(parallel)
    try:
        yield processes
    except BaseException:
        processes.end()
        raise


def _same_server() -> dict[str, str]:
    """Return the environment by which cells report to this run's server, if it has one."""
    if FlowRunContext.get() is None:
        return {}
    with get_client(sync_client=True) as client:
        return {"PREFECT_API_URL": str(client.api_url)}


def _failure(code: int, last: Sequence[str]) -> str | None:
    if code == 0:
        return None
    said = [line for line in last if line.startswith("error: ")]
    if said:
        return said[-1].removeprefix("error: ")
    if code in (130, 143, -2):
        return "interrupted"
    if code == -9:
        return "killed (out of memory?)"
    return f"ended with code {code}: {' '.join(last[-3:])}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-")
