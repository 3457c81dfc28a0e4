"""Shards on a Ray cluster: Prefect tasks on prefect-ray's task runner.

What the shards share is loaded once by each of Ray's worker processes, which then computes shard
after shard. A task run costs Prefect some tenths of a second, so shards of few seconds go several
to a task, and never more than about ``TASK_SECONDS`` of them: so much is lost when the run is
killed. A worker that dies has its task computed again by another; every other error ends the run,
with the shard's number, and what was finished is kept.
"""

import logging
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL, temporary_settings

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import InferenceSettings
from storage.errors import ArtifactCorrupt, StoreError
from storage.writer import Receipt
from tasks.cluster import RETRIES, Room, ray_cluster

log = logging.getLogger("fpo.stage")

TASK_SECONDS = 30.0


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


class ShardsDone(NamedTuple):
    """The shards of a task."""

    done: tuple[ShardDone, ...]
    seconds: float  # of computing alone, without loading


class ShardFailed(Exception):
    """A shard failed on its worker, after others of its task were finished.

    Args:
        shard: its number.
        finished: those before it.
        error: what it failed with.
    """

    def __init__(self, shard: int, finished: tuple[ShardDone, ...], error: Exception) -> None:
        super().__init__(shard, finished, error)  # as they are: it is pickled by its arguments
        self.shard, self.finished, self.error = shard, finished, error

    def __str__(self) -> str:
        return f"shard {self.shard}: {self.error}"


def run_shards(shared: _Shared, todo: Sequence[Todo]) -> ShardsDone:
    """Compute some shards, in one of Ray's worker processes.

    Raises:
        ShardFailed: one of them, with those that were finished before it.
    """
    done: list[ShardDone] = []
    started = time.perf_counter()
    for work in todo:
        try:
            worker = _worker(shared)
            if not done:
                started = time.perf_counter()
            done.append(worker.run(work))
        except Exception as error:
            log.debug("shard %d failed", work.shard, exc_info=True)
            raise ShardFailed(work.shard, tuple(done), error) from error
    return ShardsDone(tuple(done), time.perf_counter() - started)


@task(name="shards", task_run_name="shards-{numbers}", cache_policy=NO_CACHE)
def shards(shared: _Shared, todo: Sequence[Todo], numbers: str) -> ShardsDone:  # noqa: ARG001
    """Some shards as a Prefect task; ``numbers`` is what people read of it."""
    return run_shards(shared, todo)


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
        ArtifactCorrupt: what a shard is computed from is damaged.
    """
    with ray_cluster(settings) as runner:
        room, shared = Room.of(settings), _Shared(job)
        waiting, running, a_task = list(reversed(todo)), {}, 1
        try:
            while True:
                while waiting and len(running) < room.at_a_time:
                    size = min(a_task, _fair_share(len(waiting), room.at_a_time))
                    works = [waiting.pop() for _ in range(size)]
                    future = _submit(runner, room, shared, works)
                    running[future.wrapped_future] = works, future
                if not running:
                    return
                works, future = running.pop(_first_done(running))
                try:
                    found = _result(works, future)
                except ShardFailed as error:
                    yield from error.finished
                    yield from _others_finished(running)
                    raise _told(error) from error.error
                except FPOError:
                    yield from _others_finished(running)
                    raise
                yield from found.done
                a_task = _shards_a_task(found)
        finally:
            _cancel(running)


def _fair_share(waiting: int, at_a_time: int) -> int:
    """Of the last shards each worker takes fewer, so that none is left with many at the end."""
    return math.ceil(waiting / at_a_time)


def _shards_a_task(found: ShardsDone) -> int:
    a_shard = found.seconds / len(found.done)
    return max(1, int(TASK_SECONDS / max(a_shard, 1e-3)))


def _submit(runner: Any, room: Room, shared: _Shared, todo: Sequence[Todo]) -> Any:
    """Hand shards to the cluster; their worker reports to the API that this process uses."""
    from prefect_ray.context import remote_options

    first, last = todo[0].shard, todo[-1].shard
    numbers = str(first) if first == last else f"{first}-to-{last}"
    parameters = {"shared": shared, "todo": todo, "numbers": numbers}
    with remote_options(**room.options), temporary_settings({PREFECT_API_URL: room.api}):
        return runner.submit(shards, parameters)


def _first_done(running: dict[Any, Any]) -> Any:
    import ray

    (done, *_), _ = ray.wait(list(running), num_returns=1)
    return done


def _others_finished(running: dict[Any, Any]) -> Iterator[ShardDone]:
    """Of the tasks that have ended meanwhile; each is taken out of ``running``."""
    import ray

    if not running:
        return
    for reference in ray.wait(list(running), num_returns=len(running), timeout=0)[0]:
        works, future = running.pop(reference)
        try:
            yield from _result(works, future).done
        except ShardFailed as error:
            yield from error.finished
        except FPOError as error:
            log.warning("%s", error)  # the run ends with the failure that came first


def _result(todo: Sequence[Todo], future: Any) -> ShardsDone:
    from ray.exceptions import RayError

    try:
        return future.result()
    except RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FPOError(
            f"{_named(todo)}: the Ray worker died {RETRIES + 1} times ({type(error).__name__}: "
            f"{reason}). Is its memory too small? Finished shards are kept, the same command goes "
            f"on with the rest"
        ) from error
    except ShardFailed:
        raise
    except Exception as error:  # Prefect's, of the task run itself
        raise FPOError(f"{_named(todo)}: {type(error).__name__}: {error}") from error


def _named(todo: Sequence[Todo]) -> str:
    numbers = [str(work.shard) for work in todo]
    return f"shard {numbers[0]}" if len(todo) == 1 else f"shards {', '.join(numbers)}"


def _told(failed: ShardFailed) -> FPOError | StoreError:
    error = failed.error
    if isinstance(error, ArtifactCorrupt):  # which has a remedy of its own
        return ArtifactCorrupt(str(failed), error.artifact, error.version)
    if isinstance(error, FPOError | StoreError):
        return FPOError(str(failed))
    return FPOError(
        f"shard {failed.shard} failed on its Ray worker: {type(error).__name__}: {error}"
    )


def _cancel(running: dict[Any, Any]) -> None:
    """End the workers of what is under way: nobody waits for it, and a GPU is soon free again."""
    if not running:
        return
    import ray
    from ray.exceptions import RayError

    for reference in running:
        with suppress(RayError, RuntimeError, ValueError):  # it has just ended
            ray.cancel(reference, force=True)
