"""Shards on a Ray cluster: each a Prefect task on prefect-ray's task runner.

What the shards share is loaded once by each of Ray's worker processes, which then computes shard
after shard. A worker that dies has its shard computed again by another; every other error ends the
run, with the shard's number, and what was finished is kept.
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL, temporary_settings

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import InferenceSettings
from storage.errors import StoreError
from storage.writer import Receipt
from tasks.cluster import RETRIES, Room, ray_cluster

log = logging.getLogger("fpo.stage")


class Todo(NamedTuple):
    """What of one shard is missing."""

    shard: int
    stages: tuple[str, ...]


class ShardDone(NamedTuple):
    """What became of a shard; its files are in the store."""

    tokens: int
    receipts: dict[str, Receipt]  # by stage


class ShardWorker(Protocol):
    """Computes shards and writes their files."""

    def run(self, work: Todo) -> ShardDone:
        """Compute one shard."""
        ...


class ShardJob(Protocol):
    """What all shards share; picklable."""

    def worker(self) -> ShardWorker:
        """Load what the shards need, in the process that computes them."""
        ...


class _Shared:
    """A job under a name of its own, by which a process knows the one that it has loaded."""

    def __init__(self, job: ShardJob) -> None:
        self.job, self.name = job, secrets.token_hex(8)

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shared) and other.name == self.name


@lru_cache(maxsize=1)
def _worker(shared: _Shared) -> ShardWorker:
    return shared.job.worker()


def run_shard(shared: _Shared, work: Todo) -> ShardDone:
    """Compute one shard, in one of Ray's worker processes."""
    return _worker(shared).run(work)


@task(name="shard", task_run_name="shard-{work.shard}", cache_policy=NO_CACHE)
def shard(shared: _Shared, work: Todo) -> ShardDone:
    """One shard as a Prefect task."""
    return run_shard(shared, work)


def fan_out(
    job: ShardJob, todo: Sequence[Todo], settings: InferenceSettings
) -> Iterator[ShardDone]:
    """Compute shards on a Ray cluster; they come in the order in which they are finished.

    Args:
        job: what all shards share.
        todo: what is to be done of each.
        settings: which cluster, and how much of it.

    Raises:
        FPOError: no such cluster, too small a one, or a shard that failed, by its number.
    """
    with ray_cluster(settings) as runner:
        room, shared = Room.of(settings), _Shared(job)
        waiting, running = iter(todo), {}
        try:
            while True:
                for work in islice(waiting, room.at_a_time - len(running)):
                    future = _submit(runner, room, shared, work)
                    running[future.wrapped_future] = work, future
                if not running:
                    return
                work, future = running.pop(_first_done(running))
                yield _result(work, future)
        finally:
            _cancel(running)


def _submit(runner: Any, room: Room, shared: _Shared, work: Todo) -> Any:
    """Hand a shard to the cluster; its worker reports to the API that this process uses."""
    from prefect_ray.context import remote_options

    with remote_options(**room.options), temporary_settings({PREFECT_API_URL: room.api}):
        return runner.submit(shard, {"shared": shared, "work": work})


def _first_done(running: dict[Any, Any]) -> Any:
    import ray

    (done, *_), _ = ray.wait(list(running), num_returns=1)
    return done


def _result(work: Todo, future: Any) -> ShardDone:
    from ray.exceptions import RayError

    try:
        return future.result()
    except (FPOError, StoreError) as error:
        raise FPOError(f"shard {work.shard}: {error}") from error
    except RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FPOError(
            f"shard {work.shard}: its Ray worker died {RETRIES + 1} times ({type(error).__name__}: "
            f"{reason}). Is its memory too small? Finished shards are kept, the same command goes "
            f"on with the rest"
        ) from error
    except Exception as error:
        log.debug("shard %d failed on its Ray worker", work.shard, exc_info=True)
        raise FPOError(
            f"shard {work.shard} failed on its Ray worker: {type(error).__name__}: {error}"
        ) from error


def _cancel(running: dict[Any, Any]) -> None:
    """End the workers of what is under way: nobody waits for it, and a GPU is soon free again."""
    if not running:
        return
    import ray
    from ray.exceptions import RayError

    for reference in running:
        with suppress(RayError, RuntimeError, ValueError):  # it has just ended
            ray.cancel(reference, force=True)
