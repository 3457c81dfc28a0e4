"""The deployments on real work pools: handed over, rerun, refused, cancelled, taken over."""

import http.server
import json
import logging
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Scheduled

from flows import pools
from flows.setup import connected
from fpo_core.errors import FPOError
from fpo_core.recipe.schema import PoolSettings
from storage.catalog import list_artifacts
from storage.location import open_store
from tests.flows.workers import (
    ROOT,
    Worker,
    command,
    ended,
    prefect,
    read_run,
    state_of,
    submit,
    wait_for,
)
from tests.test_interrupted import children_of
from tests.tiny import save_recipe

pytestmark = pytest.mark.slow
POOLS = "resources.pools={}"  # both pools by their default names


class Site(NamedTuple):
    """A server with everything deployed, and workers' folder."""

    folder: Path
    setup: list[str]  # what `fpo prefect setup` said, the first and the second time


@pytest.fixture(scope="module")
def site(prefect_server, tmp_path_factory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    said = []
    for _ in range(2):
        done = command("cli.main", "prefect", "setup", cwd=ROOT)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    prefect("deploy", "--all", "--prefect-file", str(ROOT / "prefect.yaml"), cwd=folder)
    return Site(folder, said)


@pytest.fixture(scope="module")
def workers(site) -> Iterator[list[Worker]]:
    both = [Worker("fpo-cpu", site.folder), Worker("fpo-h100", site.folder)]
    yield both
    for worker in both:
        worker.stop()


def children(run: FlowRun) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        parent = FlowRunFilterParentFlowRunId(any_=[run.id])
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))
    return sorted(found, key=lambda child: child.created)


def keys_shown(run: FlowRun) -> set[str]:
    """The keys of a flow run's artifacts in the UI."""
    with get_client(sync_client=True) as client:
        of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
        return {str(one.key) for one in client.read_artifacts(artifact_filter=of_run)}


def artifacts(store: Path) -> dict[str, str]:
    """When each artifact was finished, by kind."""
    return {info.stage: str(info.created) for info in list_artifacts(open_store(store))}


def test_setup_makes_what_is_missing_and_leaves_the_rest(site):
    first, second = ([line.split()[0] for line in said.splitlines()[:4]] for said in site.setup)
    assert first == ["made"] * 4
    assert second == ["there"] * 4


def test_nothing_of_the_deploying_machine_is_in_a_deployment(site):
    with get_client(sync_client=True) as client:
        found = client.read_deployments()
    assert len(found) == 30
    for deployment in found:
        assert str(ROOT) not in deployment.model_dump_json()
        assert str(site.folder) not in deployment.model_dump_json()
        assert isinstance(deployment.pull_steps, list)
        assert deployment.pull_steps == [{"fpo_core.checkout.enter": {}}]
        schema = deployment.parameter_openapi_schema
        assert schema
        undescribed = [n for n, one in schema["properties"].items() if "description" not in one]
        assert undescribed == []
        # What a mistake is told with.
        patterns = re.findall(r'"pattern": "([^"]*)"', json.dumps(schema))
        assert all(len(pattern) < 150 for pattern in patterns)
        assert deployment.entrypoint
        load_flow_from_entrypoint(deployment.entrypoint)


@pytest.mark.parametrize(
    "given",
    [
        {"overrides": "train.alpha=1"},
        {"recipe": "quikstart"},
        {"only_stage": "feature"},
        {"force": "perhaps"},
        {"alpha": 1},
    ],
    ids=str,
)
def test_a_mistake_is_refused_when_the_run_is_submitted(site, given):
    done = command(
        "prefect", "--no-prompt", "deployment", "run", "fpo-pipeline/quickstart", "--params",
        json.dumps(given),
    )  # fmt: skip
    assert done.returncode != 0
    assert str(next(iter(given.values()))).strip("[]'") in done.stdout + done.stderr or (
        "alpha" in done.stdout + done.stderr
    )


def test_a_run_that_no_worker_takes_is_told_and_goes_with_its_parent(
    site, finished_run, monkeypatch, caplog
):
    tell = pools._tell_unclaimed

    def tell_and_stop(*arguments):
        tell(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(pools, "UNCLAIMED_SECONDS", 0.5)
    monkeypatch.setattr(pools, "_tell_unclaimed", tell_and_stop)
    given = {"recipe": str(finished_run.recipe), "overrides": [], "force": False, "store": None}
    with (
        get_client(sync_client=True) as client,
        caplog.at_level(logging.INFO, "fpo"),
        pytest.raises(KeyboardInterrupt),
    ):
        pools._on_pool(client, pools.Stretch("fpo-h100", ("features",)), given)
    assert "work pool fpo-h100: it has no worker" in caplog.text
    with get_client(sync_client=True) as client:
        (child,) = [run for run in client.read_flow_runs() if run.work_pool_name == "fpo-h100"]
    assert child.state is not None
    assert child.state.type.value in ("CANCELLING", "CANCELLED")


def in_training(
    finished_run: Any, store: Path, rate: str, said: list[Path]
) -> tuple[UUID, list[str]]:
    """Start the pipeline on both pools and wait for its first training step."""
    shutil.copytree(finished_run.store, store)
    overrides = ["train.epochs=100", rate, "resources.checkpoint_minutes=100"]
    parent = submit(
        "fpo-pipeline/quickstart",
        recipe=str(finished_run.recipe),
        store=str(store),
        overrides=[*overrides, POOLS],
    )
    wait_for(lambda: steps_logged(store) > 0, *said)
    return parent, overrides


def test_stages_are_handed_to_the_pools_and_run_again_by_themselves(site, workers, tmp_path):
    said = [worker.said for worker in workers]
    given = {"recipe": str(save_recipe(tmp_path)), "store": str(tmp_path / "store")}
    whole = ended(
        submit("fpo-pipeline/quickstart", **given, overrides=[POOLS],
               report_folder=str(tmp_path / "report")), *said
    )  # fmt: skip
    assert whole.state is not None
    assert whole.state.type.value == "COMPLETED", whole.state.message
    (child,) = children(whole)  # what is of the parent's own pool it computes itself
    assert (whole.work_pool_name, child.work_pool_name) == ("fpo-cpu", "fpo-h100")
    assert child.parameters["stages"] == ["reference", "features", "train", "evaluate"]
    assert whole.name == "tiny fpo"
    assert {"fpo", "recipe:tiny", "method:fpo"} <= set(whole.tags)
    assert {"fpo-tokenize", "fpo-run", "fpo-report"} <= keys_shown(whole)
    assert {"fpo-features", "fpo-train", "fpo-run"} <= keys_shown(child)
    assert (tmp_path / "report" / "report.html").is_file()
    before = artifacts(tmp_path / "store")
    assert set(before) == {"pairs", "reference", "features", "policy", "evaluation"}

    again = ended(submit("fpo-features/quickstart", **given, force=True), *said)
    assert again.state is not None
    assert again.state.type.value == "COMPLETED", again.state.message
    assert again.name == "features tiny fpo"
    after = artifacts(tmp_path / "store")
    assert [kind for kind in after if after[kind] != before[kind]] == ["features"]

    # A child's failure is its parent's, with the reason.
    refused = ended(
        submit("fpo-pipeline/quickstart", **given,
               overrides=[POOLS, "sae.gate=refuse", "features.cache_k=60"]), *said
    )  # fmt: skip
    assert refused.state is not None
    assert refused.state.type.value == "FAILED"
    assert "on the pool fpo-h100 failed: " in str(refused.state.message)
    assert "sae.gate" in str(refused.state.message)

    # Scheduled again by an event that arrived late, a run that ended does no work.
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(again.id, Scheduled(name=pools.RESUMING))
    assert state_of(again.id) == "SCHEDULED"
    once_more = ended(again.id, *said)
    assert once_more.state is not None
    assert once_more.state.type.value == "COMPLETED", once_more.state.message
    assert artifacts(tmp_path / "store") == after


def test_a_cancelled_parent_cancels_the_training_that_it_handed_over(
    site, workers, finished_run, fpo, tmp_path
):
    """In mid-training: a checkpoint in the store, and the next run starts from it."""
    said = [worker.said for worker in workers]
    store = tmp_path / "store"
    parent, overrides = in_training(finished_run, store, "train.lr=1e-6", said)
    prefect("flow-run", "cancel", str(parent))
    wait_for(lambda: state_of(parent) == "CANCELLED", *said)
    (child,) = [one for one in children(ended(parent)) if "train" in one.parameters["stages"]]
    wait_for(lambda: state_of(child.id) == "CANCELLED", *said)
    wait_for(lambda: all("worker start" in line for line in children_of(workers[1].mark)), *said)
    wait_for(lambda: list(store.glob("artifacts/policy/*/checkpoints/step-*/saved.json")), *said)
    (saved,) = store.glob("artifacts/policy/*/checkpoints/step-*/saved.json")

    settings = [part for setting in overrides for part in ("--set", setting)]
    again = fpo("run", finished_run.recipe, "--store", store, "--report", tmp_path / "r", *settings)
    assert again.code == 0, again.err
    assert f"going on from {saved.parent.name}" in again.err


def test_a_killed_parents_training_is_cancelled(site, workers, finished_run, tmp_path):
    """Prefect runs the hook in a process of its own, started in its ``runner/`` folder."""
    said = [worker.said for worker in workers]
    store = tmp_path / "store"
    parent, _ = in_training(finished_run, store, "train.lr=2e-6", said)
    (child,) = [one for one in children(read_run(parent)) if "train" in one.parameters["stages"]]
    workers[0].kill_runs()
    wait_for(lambda: state_of(parent) == "CRASHED", *said)
    wait_for(lambda: state_of(child.id) == "CANCELLED", *said)
    wait_for(lambda: all("worker start" in line for line in children_of(workers[1].mark)), *said)
    wait_for(lambda: list(store.glob("artifacts/policy/*/checkpoints/step-*/saved.json")), *said)
    assert "Runner failed to retrieve flow" not in workers[0].said.read_text()


def test_a_worker_killed_in_features_is_taken_over(site, workers, finished_run, tmp_path):
    said = [worker.said for worker in workers]
    store, killed = tmp_path / "store", workers[1]
    given = {"recipe": str(save_recipe(tmp_path)), "store": str(store),
             "overrides": ["data.shard_pairs=1", "features.tokens_k=9"]}  # fmt: skip
    ended(submit("fpo-tokenize/gemma2b", **given), *said)
    ended(submit("fpo-reference/gemma2b", **given), *said)
    run = submit("fpo-features/gemma2b", **given)
    wait_for(lambda: len(list(store.glob("artifacts/features/*/parts/*.json"))) > 1, *said)
    killed.kill()
    (folder,) = store.glob("artifacts/features/*")
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*.json")}
    assert not (folder / "manifest.json").exists()
    workers[1] = Worker("fpo-h100", site.folder)
    # What the first automation of `fpo prefect setup` does after 90 s; the second takes over.
    with get_client(sync_client=True) as client:
        unheard = State(type=StateType.PAUSED, name=pools.UNHEARD)
        client.set_flow_run_state(run, unheard)
        wait_for(lambda: state_of(run) != "PAUSED", *said)
    done = ended(run, *said)
    assert done.state is not None
    assert done.state.type.value == "COMPLETED", done.state.message
    assert (folder / "manifest.json").exists()
    assert finished
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def steps_logged(store: Path) -> int:
    logs = store.glob("scratch/policy-*/attempt/metrics.jsonl")
    return sum(len(log.read_bytes().splitlines()) for log in logs)


def test_stretches_keep_the_order_and_cut_where_the_pool_changes():
    stages = ["instructions", "sft", "tokenize", "reference", "features", "features@2", "train",
              "generate@mt", "benchmark@mt", "evaluate"]  # fmt: skip
    found = pools.stretches(stages, PoolSettings(cpu="c", gpu="g"))
    assert [pool for pool, _ in found] == ["c", "g", "c", "g", "c", "g"]
    assert [stage for _, group in found for stage in group] == stages


class _OldServer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'"2.19.0"')

    def log_message(self, format, *args):
        pass


def test_a_server_that_is_away_or_too_old_is_told():
    with http.server.HTTPServer(("127.0.0.1", 0), _OldServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        with (
            temporary_settings({PREFECT_API_URL: url}),
            pytest.raises(FPOError, match=r"is version 2\.19\.0, which is too old"),
            connected(),
        ):
            pass
        server.shutdown()
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(FPOError, match=r"no Prefect server answers at .*prefect server start"),
        connected(),
    ):
        pass
