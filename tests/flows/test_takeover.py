"""Who is taken over: the automations of ``fpo prefect setup`` on a real server with its services.

Events arrive late and in the wrong order; here they are sent so, with times in the past.
"""

import datetime as dt
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import httpx
import pytest
from prefect import State, flow, states
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import pools
from flows.setup import TAKEOVER, UNHEARD_SECONDS, WATCH, set_up
from fpo_core.errors import FPOError
from tests.flows.workers import ROOT, wait_for

pytestmark = pytest.mark.slow
# Prefect drops a watch, unjudged, whose end is a minute ago; so not later than this.
LATE = UNHEARD_SECONDS // 2


class Trap:
    """A proxy that lets nothing through and counts who tried."""

    def __init__(self) -> None:
        self.tried: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            caught, _ = self._listener.accept()
            with caught:
                self.tried.append(caught.recv(200))


class Server(NamedTuple):
    """A Prefect server, and what it tried to reach outside of this machine."""

    url: str
    trap: Trap


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """A server as the docs start it, set up while it is coming up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    home, trap = tmp_path_factory.mktemp("server"), Trap()
    unset = ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED", "PREFECT_PROFILE")
    own = {name: value for name, value in os.environ.items() if name not in unset}
    own |= {"PREFECT_HOME": str(home), "HTTPS_PROXY": trap.url, "NO_PROXY": "127.0.0.1,localhost"}
    start = [sys.executable, "-m", "prefect", "server", "start", "--port", port]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(start, cwd=ROOT, env=own, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/api"
    try:
        with temporary_settings({PREFECT_API_URL: url}):
            assert [done.state for done in set_up(wait=120)] == ["made"] * 4
            yield Server(url, trap)
    finally:
        process.terminate()
        process.wait(60)


@flow(name="fpo-stages")
def stages() -> None:
    """Stand for a flow of ours; no worker runs it."""


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def start(client: SyncPrefectClient, *then: State) -> uuid.UUID:
    """Make a run of a deployment that is running, and set further states."""
    deployment = client.create_deployment(client.create_flow(stages), "any", tags=["fpo"])
    run = client.create_flow_run_from_deployment(deployment, tags=["fpo"])
    for state in (states.Pending(), states.Running(), *then):
        client.set_flow_run_state(run.id, state, force=True)
    return run.id


def send(url: str, run: uuid.UUID, event: str = "heartbeat", seconds_ago: float = 0) -> None:
    """Send an event of a run that occurred some time ago."""
    occurred = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=seconds_ago)
    tag = {"prefect.resource.id": "prefect.tag.fpo", "prefect.resource.role": "tag"}
    sent = {
        "id": str(uuid.uuid4()),
        "occurred": occurred.isoformat(),
        "event": f"prefect.flow-run.{event}",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        "related": [tag],
    }
    httpx.post(f"{url}/events", json=[sent]).raise_for_status()


def in_run(monkeypatch, run: uuid.UUID) -> None:
    """Let ``prefect.runtime`` name this run of a deployment."""
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", str(run))
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(run))


def history(client: SyncPrefectClient, run: uuid.UUID) -> list[str]:
    found = client.read_flow_run_states(run)
    return [str(state.name) for state in sorted(found, key=lambda state: state.timestamp)]


def fired(url: str, outcome: str) -> set[str]:
    """The runs that an automation acted on, with an outcome: executed or failed."""
    since = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    wanted = {
        "event": {"name": [f"prefect.automation.action.{outcome}"]},
        "occurred": {"since": since.isoformat()},
    }
    answer = httpx.post(f"{url}/events/filter", json={"filter": wanted, "limit": 50})
    answer.raise_for_status()
    related = [one for event in answer.json()["events"] for one in event["related"]]
    ids = [one["prefect.resource.id"] for one in related]
    return {name.rpartition(".")[2] for name in ids if name.startswith("prefect.flow-run.")}


ENDED = {
    "failed within a second": states.Failed(message="train.alpha: not a number"),
    "completed": states.Completed(),
    "crashed": states.Crashed(),
    "cancelled": State(type=StateType.CANCELLED, name="Cancelled"),
    "being cancelled": states.Cancelling(),
    "waiting": states.Scheduled(scheduled_time=dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)),
}


def test_only_a_running_run_is_taken_over_whenever_its_heartbeats_arrive(server, client):
    ended = {name: start(client, state) for name, state in ENDED.items()}
    silent, alive = start(client), start(client)
    before = {run: client.read_flow_run(run).state for run in ended.values()}
    for run in (*ended.values(), silent):
        send(server.url, run, seconds_ago=LATE)  # it arrives after the end
    send(server.url, alive)
    send(server.url, alive, seconds_ago=LATE)  # overtaken by a later one
    refused = {str(run) for run in ended.values()}

    def told() -> bool:
        send(server.url, alive)  # the server's clock goes by the events that it gets
        return refused <= fired(server.url, "failed") and pools.RESUMING in history(client, silent)

    deadline = time.monotonic() + 200
    while not told():
        assert time.monotonic() < deadline, refused - fired(server.url, "failed")
        time.sleep(1)
    for name, run in ended.items():
        state, was = client.read_flow_run(run).state, before[run]
        assert state is not None
        assert was is not None
        assert (state.id, state.message) == (was.id, was.message), name
    expected = ["Scheduled", "Pending", "Running", pools.UNHEARD, pools.RESUMING]
    assert history(client, silent) == expected
    assert history(client, alive)[-1] == "Running"
    assert str(alive) not in fired(server.url, "failed") | fired(server.url, "executed")


def test_a_run_cancelled_before_it_is_taken_over_stays_cancelled(server, client):
    run = start(client, State(type=StateType.PAUSED, name=pools.UNHEARD))
    wait_for(lambda: history(client, run)[-1] == pools.RESUMING)
    client.update_flow_run(run, infrastructure_pid="gone:1")  # of the worker that died
    client.set_flow_run_state(run, states.Cancelling())
    assert history(client, run)[-1] == "Cancelled"  # no worker is needed for it
    cancelled = start(client, states.Cancelling())
    send(server.url, cancelled, pools.UNHEARD)  # delayed: it was unheard before
    wait_for(lambda: str(cancelled) in fired(server.url, "failed"))
    assert history(client, cancelled)[-1] == "Cancelling"


@pytest.mark.parametrize("ending", ["failed within a second", "cancelled", "completed"])
def test_a_run_that_ended_before_its_silence_was_told_ends_as_it_did(
    server, client, monkeypatch, ending
):
    unheard = State(type=StateType.PAUSED, name=pools.UNHEARD)
    run = start(client, unheard, ENDED[ending])
    wait_for(lambda: history(client, run)[-1] == pools.RESUMING)  # the event came late
    for state in (states.Pending(), states.Running()):
        client.set_flow_run_state(run, state)
    in_run(monkeypatch, run)
    again = pools.end_of_taken_over()
    was = ENDED[ending]
    assert (again.type, again.name, again.message) == (was.type, was.name, was.message)


@pytest.mark.parametrize("state", [states.Completed(), states.Failed()], ids=["done", "failed"])
def test_a_child_that_ended_is_not_cancelled_with_its_parent(server, client, state):
    child = start(client, state)
    pools._cancel(client, child)
    assert history(client, child)[-1] == state.name


def test_a_run_whose_workers_die_each_time_ends_itself(server, client, monkeypatch):
    unheard = State(type=StateType.PAUSED, name=pools.UNHEARD)
    again = [unheard, states.Scheduled(name=pools.RESUMING), states.Running()]
    for takeovers, ends in ((pools.TAKEOVERS, False), (pools.TAKEOVERS + 1, True)):
        in_run(monkeypatch, start(client, *again * takeovers))
        if not ends:
            assert pools.end_of_taken_over() is None
            continue
        with pytest.raises(FPOError, match=r"the worker of this run died 4 times"):
            pools.end_of_taken_over()


def test_automations_of_an_older_version_are_replaced(server, client):
    (watch,) = client.read_automations_by_name(WATCH)
    client.delete_automation(watch.id)
    (takeover,) = client.read_automations_by_name(TAKEOVER)
    older = AutomationCore(name=TAKEOVER, trigger=watch.trigger, actions=takeover.actions)
    client.update_automation(takeover.id, older)
    assert [done.state for done in set_up()] == ["there", "there", "made", "changed"]
    assert [done.state for done in set_up()] == ["there"] * 4


def test_a_server_that_the_docs_start_sends_no_usage_data(server):
    settings = httpx.get(f"{server.url}/admin/settings").json()
    assert settings["server"]["analytics_enabled"] is False
    assert server.trap.tried == []
