"""What the pipeline needs of a Prefect server: work pools, and the automations that find dead runs.

Both are made where they are missing and left as they are where they are there, so it can be run
again. There are no blocks to make: the store's place and its credentials come from the environment
of the workers, and nothing of either is kept on the server.
"""

import datetime as dt
import json
import logging
import time
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

from flows.pools import RESUMING, UNHEARD
from fpo_core.errors import FPOError
from fpo_core.recipe.schema import PoolSettings

log = logging.getLogger("fpo.flow")

OLDEST_SERVER = Version("3.4")  # automations, and workers that tell of cancellation, as used here
WATCH = "fpo: a run that is heard of no more is marked"
TAKEOVER = "fpo: a run that is heard of no more goes to the next worker"
HEARTBEAT_SECONDS = 30  # prefect.yaml; Prefect takes no less
UNHEARD_SECONDS = 3 * HEARTBEAT_SECONDS
START = "`prefect server start` starts one, and PREFECT_API_URL=http://127.0.0.1:4200/api names it"
POOLS = {
    PoolSettings().cpu: "stages of FPO pipelines that need no GPU",
    PoolSettings().gpu: "stages of FPO pipelines on a GPU: one worker a host, with --limit 1",
}
_RUNS = ResourceSpecification({"prefect.resource.id": ["prefect.flow-run.*"]})
_OURS = ResourceSpecification(
    {"prefect.resource.id": "prefect.tag.fpo", "prefect.resource.role": "tag"}
)
# The checkout's deploy/, beside the packages (the project is installed in place).
TEMPLATES = Path(str(files("flows"))).parent / "deploy" / "kubernetes"


class Done(NamedTuple):
    """One thing that is there now."""

    what: str
    state: str  # made, there, changed
    about: str


def set_up(
    *, kubernetes: bool = False, gpu_runs: int | None = None, wait: float = 0
) -> Iterator[Done]:
    """Make what is missing on the server that ``PREFECT_API_URL`` names.

    Args:
        kubernetes: pools whose runs are jobs of a cluster, by the templates in ``deploy/``.
        gpu_runs: most runs at a time on the GPU pool, over all its workers; None leaves it alone.
        wait: seconds to wait for a server that does not listen yet.

    Raises:
        FPOError: no server, one that is too old, or a pool of the same name and another type.
    """
    with connected(wait) as client:
        kind = "kubernetes" if kubernetes else "process"
        for name, about in POOLS.items():
            yield _pool(client, name, about, kind)
        if gpu_runs is not None:
            yield _limit(client, PoolSettings().gpu, gpu_runs)
        silence = f"after {UNHEARD_SECONDS} s without a heartbeat, where it runs"
        yield _automation(client, _watch(), silence)
        yield _automation(client, _takeover(), f"a run that is {UNHEARD} is scheduled again")
        _warn_of_telemetry(client)


@contextmanager
def connected(wait: float = 0) -> Iterator[SyncPrefectClient]:
    """Open a client of the server that ``PREFECT_API_URL`` names.

    Args:
        wait: seconds to wait for a server that does not listen yet.

    Raises:
        FPOError: no server is named, none answers within this time, or it is too old.
    """
    url = PREFECT_API_URL.value()
    if not url:
        raise FPOError(f"no Prefect server is named: {START}")
    with get_client(sync_client=True) as client:
        version = _version_of(client, url, wait)
        if version < OLDEST_SERVER:
            raise FPOError(
                f"the Prefect server at {url} is version {version}, which is too old: install "
                f"{OLDEST_SERVER} or newer where it runs (pip install -U prefect), and start it "
                f"again"
            )
        yield client


def _version_of(client: SyncPrefectClient, url: str, wait: float) -> Version:
    deadline, told = time.monotonic() + wait, False
    while True:
        try:
            return Version(client.api_version())
        except httpx.UnsupportedProtocol as error:
            raise FPOError(f"PREFECT_API_URL={url} is not an http:// address: {START}") from error
        except httpx.TransportError as error:  # nobody listens there, or not yet
            if time.monotonic() >= deadline:
                raise FPOError(f"no Prefect server answers at {url} ({error}): {START}") from error
            if not told:
                log.info("waiting %.0f s at most for the Prefect server at %s", wait, url)
            told = True
            time.sleep(1)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            why = f"{status} {error.response.reason_phrase}"
            if status in (401, 403):
                why += "; PREFECT_API_AUTH_STRING has its password"
            raise FPOError(f"the Prefect server at {url} refuses: {why}") from error
        except (TypeError, ValueError) as error:  # a page, another service's JSON
            raise FPOError(
                f"what answers at {url} is not a Prefect API. Its address ends in /api: {START}"
            ) from error


def _warn_of_telemetry(client: SyncPrefectClient) -> None:
    """Warn if the server sends usage data; its UI and its clients go by the same setting."""
    settings = client.request("GET", "/admin/settings").json()
    if settings.get("server", {}).get("analytics_enabled"):
        log.warning(
            "this server, its UI and its clients send usage data to Prefect. To turn that off, "
            "start it in the checkout or with PREFECT_SERVER_ANALYTICS_ENABLED=false"
        )


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


def _automation(client: SyncPrefectClient, wanted: AutomationCore, about: str) -> Done:
    what = f"automation {wanted.name!r}"
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(wanted)
        return Done(what, "made", about)
    if _acts(found[0]) == _acts(wanted):
        return Done(what, "there", about)
    client.update_automation(found[0].id, wanted)  # of an older version of this project
    return Done(what, "changed", about)


def _acts(automation: AutomationCore) -> dict[str, Any]:
    """Return when an automation acts, and what it does then."""
    return automation.model_dump(include={"trigger", "actions"}, exclude={"trigger": {"id"}})


def _watch() -> AutomationCore:
    """Return the automation that marks a silent run as unheard, if the server has it as running.

    Events arrive in any order: the last heartbeat of a run that failed within a second arrives
    after ``Failed`` and begins the watch. So silence alone proves nothing. The server refuses to
    pause a run that is not running: one that ended, is being cancelled or waits stays as it is.
    """
    ends = ("Completed", "Failed", "Crashed", "Cancelling", "Cancelled")
    return AutomationCore(
        name=WATCH,
        description="Its worker or host died, or its network. Runs that ended are left alone.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
            posture=Posture.Proactive,
            threshold=1,
            within=dt.timedelta(seconds=UNHEARD_SECONDS),
            for_each={"prefect.resource.id"},
            match=_RUNS,
            match_related=_OURS,
        ),
        actions=[
            _change(
                UNHEARD,
                StateType.PAUSED,
                f"nothing was heard of this run for {UNHEARD_SECONDS} s: its worker or host died",
            )
        ],
    )


def _takeover() -> AutomationCore:
    """Return the automation that schedules an unheard run again.

    The step is not forced either: a run that is being cancelled in the meantime stays so. One that
    has ended in the meantime ends again as it did (``flows.pools.end_of_taken_over``).
    """
    return AutomationCore(
        name=TAKEOVER,
        description="The next worker takes it over and resumes from the store. A run that is "
        "unheard each time ends itself (flows/pools.py).",
        trigger=EventTrigger(
            expect={f"prefect.flow-run.{UNHEARD}"},
            posture=Posture.Reactive,
            threshold=1,
            for_each={"prefect.resource.id"},
            match=_RUNS,
            match_related=_OURS,
        ),
        actions=[
            _change(
                RESUMING,
                StateType.SCHEDULED,
                "its worker or host is gone; the next worker takes it over",
            )
        ],
    )


def _change(name: str, state: StateType, message: str) -> Any:
    """Return the action that sets a run's state if Prefect's order of states allows it."""
    return ChangeFlowRunState(name=name, state=state, message=message, force=False)
