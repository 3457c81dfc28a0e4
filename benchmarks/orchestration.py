"""What Prefect adds: to a run that has nothing to compute, and to shards that are fanned out.

    python -m benchmarks.orchestration --store ../fpo-store     where `quickstart` is done
    python -m benchmarks.orchestration --shards 1000 --seconds 2

The first needs a server that ``PREFECT_API_URL`` names, with the deployments of ``prefect.yaml``
and a worker of ``fpo-cpu``. It submits ``fpo-pipeline/quickstart``, all of whose stages are done,
and takes the time from Pending, when the worker has it, to Completed, by the server's clock. In
turn a process that imports Prefect and runs an empty flow on that server: the bare start.

The second fans shards that sleep out over Ray, as the inference stages do, and compares with the
waiting alone: shards times seconds over workers.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from fpo_core.recipe.schema import InferenceSettings
from storage.writer import Receipt
from tasks.fanout import ShardDone, Todo, fan_out


class _Sleeper:
    """A shard worker whose work is to wait."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, work: Todo) -> ShardDone:  # noqa: ARG002
        """Wait."""
        time.sleep(self.seconds)
        receipts: dict[str, Receipt] = {}
        return ShardDone(0, receipts)


class _SleepJob:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def worker(self) -> _Sleeper:
        """One process's."""
        return _Sleeper(self.seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", help="in which quickstart is done")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int)
    parser.add_argument("--seconds", type=float, default=2.0, help="a shard takes")
    parser.add_argument("--workers", type=int, default=8, help="shards at a time")
    options = parser.parse_args()
    if options.shards:
        _fan_out(options.shards, options.seconds, options.workers)
    elif options.store:
        _warm(options.store, options.rounds)
    else:
        parser.error("--store or --shards is needed")


def _fan_out(shards: int, seconds: float, workers: int) -> None:
    # Waiting takes no processor: with a small share of one for each, so many wait at a time.
    settings = InferenceSettings(runner="ray", cpus=(os.cpu_count() or 1) / workers)
    todo = [Todo(shard, ("features",)) for shard in range(shards)]
    # The first shards of each process load it; what a run of hours does not notice is left out.
    started, first = time.perf_counter(), 0.0
    for done, _ in enumerate(fan_out(_SleepJob(seconds), todo, settings), 1):
        if done == workers:
            first = time.perf_counter()
    ended = time.perf_counter()
    alone = (shards - workers) * seconds / workers
    print(f"{shards} shards of {seconds} s, {workers} at a time: {ended - started:.1f} s")
    print(f"after the first {workers}: {ended - first:.1f} s, the waiting alone {alone:.1f} s")
    print(f"overhead: {(ended - first) / alone - 1:.1%}")


def _warm(store: str, rounds: int) -> None:
    from prefect.client.orchestration import get_client

    warm, bare = [], []
    with get_client(sync_client=True) as client:
        for _ in range(rounds):
            warm.append(
                _run(client, "fpo-pipeline/quickstart", {"store": str(Path(store).absolute())})
            )
            bare.append(_bare_start())
    for name, seconds in (("warm fpo-pipeline", warm), ("bare start", bare)):
        low, high = min(seconds), max(seconds)
        print(f"{name}: {statistics.median(seconds):.1f} s ({low:.1f}-{high:.1f})")
    over = [one - other for one, other in zip(warm, bare, strict=True)]
    print(
        f"above the bare start: {statistics.median(over):.1f} s ({min(over):.1f}-{max(over):.1f})"
    )


def _run(client: Any, deployment: str, parameters: dict[str, Any]) -> float:
    """Seconds from the worker's submission to the end."""
    from prefect.deployments import run_deployment

    run: Any = run_deployment(deployment, parameters=parameters, timeout=0)
    while True:
        found = client.read_flow_run(UUID(str(run.id)))
        if found.state.is_final():
            assert found.state.is_completed(), found.state.message
            states = {state.name: state.timestamp for state in client.read_flow_run_states(run.id)}
            return (states["Completed"] - states["Pending"]).total_seconds()
        time.sleep(0.2)


def _bare_start() -> float:
    """What a worker does at least: a process that imports Prefect and runs an empty flow."""
    started = time.perf_counter()
    code = "from prefect import flow\n@flow\ndef nothing(): pass\nnothing()"
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
