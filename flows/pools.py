"""Stages on the work pools that a recipe names: a child run for each stretch of them.

Prefect's ``run_deployment`` neither raises for a child that failed nor cancels one whose parent is
cancelled; here both hold. A child whose worker died is submitted again, and goes on with what is in
the store.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple
from uuid import UUID

from prefect import State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelling

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import PoolSettings
from tasks.plan import kind_of
from tasks.run import Outcome, PipelineRun

log = logging.getLogger("fpo.flow")

CPU_STAGES = ("instructions", "tokenize", "benchmark")
POLL_SECONDS = 2.0
UNCLAIMED_SECONDS = 60.0  # until a run that no worker has taken is worth a line
TAKEOVERS = 3  # of one run whose worker dies: one that kills it each time would go on for ever
UNHEARD = "Unheard"  # the state of a run whose heartbeats ended (`fpo prefect setup`)
RESUMING = "Resuming"  # and then, until a worker takes it; by this name it can be cancelled at once
WAITING = (StateType.SCHEDULED, StateType.PENDING)
AT_WORK = (*WAITING, StateType.RUNNING, StateType.PAUSED)


BringAbout = Callable[[PipelineRun, Sequence[str]], dict[str, Outcome]]


class Stretch(NamedTuple):
    """Stages in a row that run on one pool."""

    pool: str
    stages: tuple[str, ...]


def stretches(stages: Sequence[str], pools: PoolSettings) -> list[Stretch]:
    """Cut the stages, in order, where the pool changes; in one run a pass may feed several."""

    def pool_of(stage: str) -> str:
        return pools.cpu if kind_of(stage) in CPU_STAGES else pools.gpu

    return [Stretch(pool, tuple(group)) for pool, group in groupby(stages, pool_of)]


def bring_about_on_pools(
    run: PipelineRun, stages: Sequence[str], given: Mapping[str, Any], here: BringAbout
) -> dict[str, Outcome]:
    """Bring about some stages on the recipe's pools, stretch by stretch.

    Those of the pool that this run is on itself are computed here: a run that waits for another on
    its own pool would hold the place that the other needs.

    Args:
        run: the pipeline run.
        stages: their names, as planned.
        given: the parameters of the flow: recipe, overrides, force and store.
        here: brings about stages in this process.

    Raises:
        FPOError: a child that did not complete, with its reason, or a deployment that is not there.
    """
    pools = run.recipe.resources.pools
    assert pools is not None
    outcomes: dict[str, Outcome] = {}
    with get_client(sync_client=True) as client:
        own_pool = client.read_flow_run(UUID(flow_run.id)).work_pool_name
        for stretch in stretches(stages, pools):
            if stretch.pool == own_pool:
                outcomes |= here(run, stretch.stages)
                continue
            missing = {stage for stage in stretch.stages if run.missing(stage)}
            if missing:  # else there is nothing to wait for a worker for
                _on_pool(client, stretch, given)
            for stage in stretch.stages:
                outcomes[stage] = run.told(stage, "computed" if stage in missing else "reused")
    return outcomes


def _on_pool(client: SyncPrefectClient, stretch: Stretch, given: Mapping[str, Any]) -> None:
    name = f"fpo-stages/{stretch.pool}"
    parameters = {**given, "stages": list(stretch.stages)}
    for attempt in range(1 + TAKEOVERS):
        # A parent that was taken over itself asks for the same child again, and finds it.
        key = f"{flow_run.id}:{stretch.stages[0]}:{attempt}"
        try:
            child = run_deployment(name, parameters=parameters, timeout=0, idempotency_key=key)
        except ObjectNotFound as error:
            raise FPOError(
                f"no deployment {name}, which runs stages on the work pool {stretch.pool!r} "
                f"(resources.pools): `prefect deploy --all` makes those of this project, and "
                f"`fpo prefect setup` its pools"
            ) from error
        assert isinstance(child, FlowRun)
        log.info("%s: on the pool %s, as run %s", ", ".join(stretch.stages), stretch.pool,
                 child.name)  # fmt: skip
        try:
            state = _outcome(client, child.id, stretch.pool)
        except BaseException:  # cancelled, or interrupted: the child is not to go on by itself
            _cancel(client, child.id)
            raise
        if state.type == StateType.COMPLETED:
            return
        ended = state.type.value.lower()
        reason = f"run {child.name} on the pool {stretch.pool} {ended}"
        if state.message:
            reason += f": {state.message}"
        if state.type != StateType.CRASHED or attempt == TAKEOVERS:
            raise FPOError(reason)
        log.warning("%s; submitted again, it goes on with what it had finished", reason)


def _outcome(client: SyncPrefectClient, child: UUID, pool: str) -> State:
    """The state a child ends in; says now and then that nobody takes it."""
    since, told = time.monotonic(), False
    while True:
        state = client.read_flow_run(child).state
        if state is not None and state.is_final():
            return state
        waiting = state is None or state.type in WAITING
        if waiting and not told and time.monotonic() - since > UNCLAIMED_SECONDS:
            told = True
            _tell_unclaimed(client, pool)
        time.sleep(POLL_SECONDS)


def _tell_unclaimed(client: SyncPrefectClient, pool: str) -> None:
    try:
        online = [w for w in client.read_workers_for_work_pool(pool) if w.status == "ONLINE"]
        paused = client.read_work_pool(pool).is_paused
    except ObjectNotFound:
        log.warning("there is no work pool %s: `fpo prefect setup` makes it", pool)
        return
    why = f"its {len(online)} workers are busy" if online else "it has no worker"
    if paused:
        why = "it is paused"
    log.warning(
        "nobody has taken this run for %.0f s on the work pool %s: %s. It waits; `prefect worker "
        "start --pool %s --limit 1` on a host of that pool starts one",
        UNCLAIMED_SECONDS, pool, why, pool,
    )  # fmt: skip


def _cancel(client: SyncPrefectClient, child: UUID) -> None:
    # Not forced: a child that has ended stays as it ended, and one that waits ends at once.
    client.set_flow_run_state(child, Cancelling(message="its parent run ended"))


def cancel_children(flow: Any, flow_run: FlowRun, state: State) -> None:  # noqa: ARG001
    """Hook of a run that was cancelled or crashed: its children do not go on by themselves."""
    with get_client(sync_client=True) as client:
        for child in _children_at_work(client, flow_run.id):
            log.info("cancelling run %s", child.name)
            _cancel(client, child.id)


def _children_at_work(client: SyncPrefectClient, parent: UUID) -> Iterator[FlowRun]:
    yield from client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[parent]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(AT_WORK))),
        )
    )


def end_of_taken_over() -> Any:
    """Return the state that a run ended in before it was scheduled again, None if it had not.

    ``fpo prefect setup`` makes the server schedule silent runs again. It acts on an event, and a
    run can end before that event arrives. Such a run does no work: its flow returns this state,
    and Prefect ends the run in it.

    Raises:
        FPOError: the workers of this run died four times.
    """
    if deployment.id is None:
        return None
    with get_client(sync_client=True) as client:
        found = client.read_flow_run_states(UUID(flow_run.id))
    history = sorted(found, key=lambda state: state.timestamp)
    unheard = sum(state.name == UNHEARD for state in history)
    if unheard > TAKEOVERS:
        raise FPOError(
            f"the worker of this run died {unheard} times: its log says why (a process killed for "
            f"memory, a host that died). A new run resumes from the finished stages and shards"
        )
    before = [was for was, state in pairwise(history) if state.name == RESUMING]
    if not before or not before[-1].is_final():
        return None
    return State(type=before[-1].type, name=before[-1].name, message=before[-1].message)
