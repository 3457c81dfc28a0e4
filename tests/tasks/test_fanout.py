"""Shards on a real Ray cluster of this machine: the same files, and what becomes of failures."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import InferenceSettings
from storage.errors import ArtifactCorrupt
from tasks import fanout
from tasks.cluster import RETRIES, Room, check_ray, ray_cluster
from tasks.fanout import ShardDone, ShardFailed, Todo, fan_out
from tasks.features import features
from tasks.offline import OfflineJob
from tasks.reference import reference
from tasks.run import PipelineRun, prepare_run

ON_RAY = ["resources.inference.runner=ray"]
LAST = 3  # shard of four
OF_TWO = InferenceSettings(runner="ray", workers=2)


@pytest.fixture(scope="module")
def ray(prefect_server) -> Iterator[None]:
    """A cluster of two CPUs, which the runs of these tests find started."""
    with ray_cluster(OF_TWO):
        yield
    import ray

    assert not ray.is_initialized()


@flow
def caches(run: PipelineRun) -> None:
    reference(run, ["features"])
    features(run)


@pytest.fixture
def prepared(finished_run, tmp_path):
    """A run of the finished run's recipe on a store that has its pairs alone, on Ray."""

    def prepare(overrides: list[str]) -> PipelineRun:
        artifacts = "artifacts/pairs"
        if not (tmp_path / "store").exists():
            shutil.copytree(finished_run.store / artifacts, tmp_path / "store" / artifacts)
        return prepare_run(str(finished_run.recipe), overrides, str(tmp_path / "store"))[0]

    return prepare


def files(run: PipelineRun) -> dict[str, Any]:
    return {stage: run.artifact(stage).manifest["files"] for stage in ("reference", "features")}


def files_in_process(finished_run) -> dict[str, Any]:
    return files(prepare_run(str(finished_run.recipe), [], str(finished_run.store))[0])


class Hindered(NamedTuple):
    """A job whose worker does something else first, on one shard."""

    job: OfflineJob
    folder: Path
    how: str

    def worker(self) -> "HinderedWorker":
        return HinderedWorker(self)


class HinderedWorker:
    def __init__(self, hindered: Hindered) -> None:
        self.hindered, self.loaded = hindered, None

    def run(self, work: Todo) -> ShardDone:
        if work.shard == LAST:
            getattr(self, self.hindered.how)()
        self.loaded = self.loaded or self.hindered.job.worker()
        return self.loaded.run(work)

    def wait_to_be_killed_once(self) -> None:
        if not (self.hindered.folder / "killed").exists():
            (self.hindered.folder / "pid").write_text(str(os.getpid()))
            time.sleep(60)

    def refuse(self) -> None:
        raise FPOError("the pairs are of another tokenizer")


def hinder(monkeypatch, folder: Path, how: str) -> None:
    of = OfflineJob.of
    monkeypatch.setattr(
        OfflineJob, "of", lambda run, stages: Hindered(of(run, stages), folder, how)
    )


@pytest.mark.slow
def test_the_shard_of_a_killed_worker_is_computed_again(
    ray, prepared, finished_run, tmp_path, monkeypatch
):
    """By SIGKILL to its process, in the midst of a shard."""
    hinder(monkeypatch, tmp_path, "wait_to_be_killed_once")

    def kill() -> None:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        (tmp_path / "killed").touch()
        os.kill(int(pid.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run = prepared(ON_RAY)
    caches(run)
    killer.join(1)
    assert not killer.is_alive()
    assert files(run) == files_in_process(finished_run)


@pytest.mark.slow
def test_the_files_are_those_of_one_process(ray, prepared, finished_run, tmp_path, monkeypatch):
    """Also when a shard has failed, by its name, and the same command went on with the rest."""
    with monkeypatch.context() as patched:
        hinder(patched, tmp_path, "refuse")
        with pytest.raises(FPOError, match=f"shard {LAST}: the pairs are of another tokenizer"):
            caches(prepared(ON_RAY))
    run = prepared(ON_RAY)
    assert run.store.state("reference", run.plan.version("reference")) == "partial"
    caches(run)
    assert files(run) == files_in_process(finished_run)
    assert run.artifact("reference").manifest["stats"]["shared_pass_with"] == ["features"]
    assert run.artifact("reference").num_shards() == LAST + 1


class Failing(NamedTuple):
    """A job without a model, whose shards fail."""

    folder: Path

    def worker(self) -> "Failing":
        return self

    def run(self, work: Todo) -> ShardDone:
        if work.stages == ("die",):
            with (self.folder / "deaths").open("a") as deaths:
                deaths.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("a mistake of ours")


@pytest.mark.slow
def test_a_shard_that_kills_every_worker_ends_the_run(ray, tmp_path):
    with pytest.raises(FPOError, match=f"shard 7: the Ray worker died {RETRIES + 1} times"):
        list(fan_out(Failing(tmp_path), [Todo(7, ("die",))], OF_TWO))
    assert len((tmp_path / "deaths").read_text()) == RETRIES + 1


@pytest.mark.slow
def test_a_mistake_of_ours_is_told_with_its_shard(ray, tmp_path):
    with pytest.raises(FPOError, match="shard 5 failed on its Ray worker: ZeroDivisionError: a mi"):
        list(fan_out(Failing(tmp_path), [Todo(5, ())], OF_TWO))


def test_a_damaged_file_comes_back_from_a_worker_as_one():
    damage = ArtifactCorrupt("pairs/0123 is damaged: 00001.parquet: cut", "pairs", "0123")
    failed = ShardFailed(3, (ShardDone(7, {}),), damage)
    back = pickle.loads(pickle.dumps(failed))  # noqa: S301
    assert back.finished == failed.finished
    told = fanout._told(back)
    assert isinstance(told, ArtifactCorrupt)
    assert str(told) == "shard 3: pairs/0123 is damaged: 00001.parquet: cut"
    assert (told.artifact, told.version) == ("pairs", "0123")


class Short(NamedTuple):
    """A job whose shards take no time and say their number as their tokens.

    The last one fails, once the shards of all other tasks have come to the one that asked for them.
    """

    last: int
    others_came: Path

    def worker(self) -> "Short":
        return self

    def run(self, work: Todo) -> ShardDone:
        if work.shard == self.last:
            ends = time.monotonic() + 60
            while not self.others_came.exists() and time.monotonic() < ends:
                time.sleep(0.05)
            raise FPOError("it cannot be computed")
        return ShardDone(work.shard, {})


@pytest.mark.slow
def test_short_shards_share_a_task_and_those_before_a_failed_one_are_kept(
    ray, tmp_path, monkeypatch
):
    sent: list[int] = []
    submit = fanout._submit
    monkeypatch.setattr(
        fanout, "_submit", lambda *args: sent.append(len(args[-1])) or submit(*args)
    )
    last = 199
    todo = [Todo(number, ()) for number in range(last + 1)]
    done: list[int] = []
    others_came = tmp_path / "others came"

    def ask() -> None:
        for shard in fan_out(Short(last, others_came), todo, OF_TWO):
            done.append(shard.tokens)
            if sum(sent) == len(todo) and len(done) == len(todo) - sent[-1]:
                others_came.touch()

    with pytest.raises(FPOError, match=f"shard {last}: it cannot be computed"):
        ask()
    assert others_came.exists()
    assert sorted(done) == list(range(last))
    assert sum(sent) == last + 1
    assert (sent[:2], max(sent) > 20) == ([1, 1], True)
    assert len(sent) < 40
    assert sent[-1] == 1  # nobody is left with many at the end


@pytest.mark.slow
def test_what_other_workers_finished_before_the_failure_was_seen_is_kept(
    ray, tmp_path, monkeypatch
):
    def the_failed_one_when_all_have_ended(running: dict[Any, Any]) -> Any:
        import ray

        ray.wait(list(running), num_returns=len(running))
        return next(ref for ref, (works, _) in running.items() if works[0].shard == 1)

    monkeypatch.setattr(fanout, "_first_done", the_failed_one_when_all_have_ended)
    done: list[ShardDone] = []
    with pytest.raises(FPOError, match="shard 1: it cannot be computed"):
        done.extend(fan_out(Short(1, tmp_path), [Todo(0, ()), Todo(1, ())], OF_TWO))
    assert [shard.tokens for shard in done] == [0]


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused(ray):
    settings = OF_TWO.model_copy(update={"gpus": 2.0})
    with pytest.raises(FPOError, match=r"2 GPUs \(resources\.inference\.cpus and \.gpus\)"):
        Room.of(settings)
    with pytest.raises(FPOError, match="64 CPUs and 0 GPUs"):
        list(fan_out(None, [Todo(0, ())], OF_TWO.model_copy(update={"cpus": 64.0})))  # pyright: ignore[reportArgumentType]
    assert Room.of(OF_TWO).at_a_time == 2
    assert Room.of(InferenceSettings(runner="ray")).at_a_time == 2
    assert Room.of(OF_TWO).options["num_gpus"] == 0


def test_an_address_where_no_cluster_answers_is_told_at_once():
    settings = InferenceSettings(runner="ray", address="127.0.0.1:1")
    started = time.monotonic()
    with (
        pytest.raises(FPOError, match=r"address=127\.0\.0\.1:1: no Ray cluster answers there"),
        ray_cluster(settings),
    ):
        pass
    assert time.monotonic() - started < 30  # Ray itself would try for minutes


def test_an_address_with_an_impossible_port_is_told():
    with pytest.raises(
        FPOError, match=r"address=127\.0\.0\.1:99999: no Ray cluster .*range 0-65535"
    ):
        check_ray(InferenceSettings(runner="ray", address="127.0.0.1:99999"))


def test_where_ray_is_not_installed_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(FPOError, match=r"pip install 'fpo-pipeline\[ray\]'"):
        check_ray(OF_TWO)
    check_ray(InferenceSettings())


@pytest.mark.slow
@pytest.mark.parametrize("when", ["ray::DashboardAgent", "ray::shard"])
def test_nothing_survives_a_run_that_is_interrupted(finished_run, tmp_path, when):
    """While the cluster starts, and later; it listens on the loopback interface alone."""
    shutil.copytree(finished_run.store / "artifacts/pairs", tmp_path / "artifacts/pairs")
    command = [sys.executable, "-m", "cli.main", "run", finished_run.recipe, "--store", tmp_path,
               "--only", "reference", "--set", *ON_RAY]  # fmt: skip
    server = str(get_client(sync_client=True).api_url)  # that of these tests
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PREFECT_API_URL": server}
    ) as driver:
        started = wait_for(when, psutil.Process(driver.pid))
        addresses = {
            connection.laddr.ip for process in started for connection in listening(process)
        }
        driver.send_signal(signal.SIGINT)
        _, err = driver.communicate(timeout=60)
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert driver.returncode == 130, err
    assert "the same command goes on" in err
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def wait_for(name: str, driver: psutil.Process) -> list[psutil.Process]:
    """All processes below the driver, once one of this name is among them."""
    for _ in range(600):
        below = driver.children(recursive=True)
        if any(name_of(process).startswith(name) for process in below):
            return below
        time.sleep(0.1)
    raise AssertionError(f"no {name} was started")


def name_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def listening(process: psutil.Process) -> list[Any]:
    try:
        return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    except psutil.Error:
        return []
