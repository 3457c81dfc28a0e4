"""What the pipeline needs of a Prefect server: work pools, and the automation that finds dead runs.

Both are made where they are missing and left as they are where they are there, so it can be run
again. There are no blocks to make: the store's place and its credentials come from the environment
of the workers, and nothing of either is kept on the server.
"""

import datetime as dt
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from packaging.version import Version
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import PoolSettings

OLDEST_SERVER = Version("3.4")  # automations, and workers that tell of cancellation, as used here
TAKEOVER = "fpo: a run that is heard of no more goes to the next worker"
HEARTBEAT_SECONDS = 30  # prefect.yaml; Prefect takes no less
UNHEARD_SECONDS = 3 * HEARTBEAT_SECONDS
POOLS = {
    PoolSettings().cpu: "stages of FPO pipelines that need no GPU",
    PoolSettings().gpu: "stages of FPO pipelines on a GPU: one worker a host, with --limit 1",
}
# The checkout's deploy/, beside the packages (the project is installed in place).
TEMPLATES = Path(str(files("flows"))).parent / "deploy" / "kubernetes"


class Done(NamedTuple):
    """One thing that is there now."""

    what: str
    state: str  # made, there, changed
    about: str


def set_up(*, kubernetes: bool = False, gpu_runs: int | None = None) -> Iterator[Done]:
    """Make what is missing on the server that ``PREFECT_API_URL`` names.

    Args:
        kubernetes: pools whose runs are jobs of a cluster, by the templates in ``deploy/``.
        gpu_runs: most runs at a time on the GPU pool, over all its workers; None leaves it alone.

    Raises:
        FPOError: no server, one that is too old, or a pool of the same name and another type.
    """
    with connected() as client:
        kind = "kubernetes" if kubernetes else "process"
        for name, about in POOLS.items():
            yield _pool(client, name, about, kind)
        if gpu_runs is not None:
            yield _limit(client, PoolSettings().gpu, gpu_runs)
        yield _takeover(client)


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """A client of the server that ``PREFECT_API_URL`` names.

    Raises:
        FPOError: none is named, none answers there, or it is too old.
    """
    url = PREFECT_API_URL.value()
    start = (
        "`prefect server start` starts one, and PREFECT_API_URL=http://127.0.0.1:4200/api names it"
    )
    if not url:
        raise FPOError(f"no Prefect server is named: {start}")
    with get_client(sync_client=True) as client:
        try:
            version = client.api_version()
        except (httpx.HTTPError, OSError) as error:
            raise FPOError(f"no Prefect server answers at {url} ({error}): {start}") from error
        if Version(version) < OLDEST_SERVER:
            raise FPOError(
                f"the Prefect server at {url} is version {version}, which is too old: install "
                f"{OLDEST_SERVER} or newer where it runs (pip install -U prefect), and start it "
                f"again"
            )
        yield client


def _pool(client: SyncPrefectClient, name: str, about: str, kind: str) -> Done:
    what = f"work pool {name}"
    try:
        there = client.read_work_pool(name)
    except ObjectNotFound:
        # A pool without a template gets the worker's own at its start: two workers at once would
        # write it at once, for which SQLite has no patience.
        own = ProcessWorker.get_default_base_job_template()
        template = _template(name) if kind == "kubernetes" else own
        made = WorkPoolCreate(name=name, description=about, type=kind, base_job_template=template)
        client.create_work_pool(made)
        return Done(what, "made", f"{kind}, {about}")
    if there.type != kind:
        raise FPOError(
            f"work pool {name} is there with type {there.type}, not {kind}: delete it (`prefect "
            f"work-pool delete {name}`) and run this again, or leave the deployments to it as it is"
        )
    return Done(what, "there", there.type)


def _template(pool: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{pool}.json").read_text(encoding="utf-8"))


def _limit(client: SyncPrefectClient, name: str, runs: int) -> Done:
    what, there = f"concurrency of {name}", client.read_work_pool(name).concurrency_limit
    if there == runs:
        return Done(what, "there", f"{runs} runs at a time")
    client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=runs))
    return Done(what, "changed", f"{runs} runs at a time" + (f", was {there}" if there else ""))


def _takeover(client: SyncPrefectClient) -> Done:
    about = f"after {UNHEARD_SECONDS} s without a heartbeat"
    if client.read_automations_by_name(TAKEOVER):
        return Done(f"automation {TAKEOVER!r}", "there", about)
    # Every state but those that a run goes on from ends the watch: a finished run is left alone.
    ends = ("Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Paused", "Suspended",
            "Scheduled", "AwaitingRetry", "Pending")  # fmt: skip
    client.create_automation(
        AutomationCore(
            name=TAKEOVER,
            description="Its worker or host died: it is scheduled again, and goes on with what is "
            "in the store. A run that crashes each time ends itself (flows/pools.py).",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
                match=ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]}),
                match_related=ResourceSpecification(
                    {"prefect.resource.id": "prefect.tag.fpo", "prefect.resource.role": "tag"}
                ),
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=dt.timedelta(seconds=UNHEARD_SECONDS),
            ),
            actions=[_hand_over()],
        )
    )
    return Done(f"automation {TAKEOVER!r}", "made", about)


def _hand_over() -> Any:
    """Schedule the run again; Prefect's order of states knows no such step, so it is forced."""
    return ChangeFlowRunState(
        name="AwaitingRetry",
        state=StateType.SCHEDULED,
        message=f"nothing was heard of this run for {UNHEARD_SECONDS} s: its worker or host is "
        f"gone. The next worker takes it over.",
        force=True,
    )
