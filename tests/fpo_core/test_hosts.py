"""Training on several hosts: the hostfile, and real runs over ssh on the loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fpo_core.errors import FPOError
from fpo_core.recipe.schema import ResourceSettings
from fpo_core.training.checkpoint import is_complete
from fpo_core.training.failure import failure
from fpo_core.training.hosts import Host, read_hostfile, run_hosts
from fpo_core.training.launch import run_workers
from tests.fpo_core.workers import job, ranks_of, train, worker_processes
from tests.ssh_hosts import two_hosts

__all__ = ["two_hosts"]

ROOT = Path(__file__).parents[2]


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    file = tmp_path / "hostfile"
    file.write_text("# nodes\n\nworker-0 slots=8\n  user@worker-1   slots=4  # the old one\n")
    assert read_hostfile(file) == (Host("worker-0", 8), Host("user@worker-1", 4))
    assert dict(read_hostfile(file)) == fetch_hostfile(str(file))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one slots=2\ntwo\n", r"line 2: 'two' is not `HOST slots=N`"),
        ("one slots=0\n", r"line 1: 'one slots=0' is not"),
        ("one slots=two\n", r"line 1: .* is not"),
        ("one slots=1\n# x\none slots=2\n", r"line 3: the host 'one' is named a second time"),
        ("a;b slots=1\n", r"line 1: 'a;b' is not the name of a host"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_bad_hostfile_is_named_with_its_line(tmp_path, text, message):
    file = tmp_path / "hostfile"
    file.write_text(text)
    with pytest.raises(FPOError, match=rf"resources\.hostfile: .*{message}"):
        read_hostfile(file)


def test_ranks_and_slots_have_to_agree(two_hosts):
    found = run_hosts(ResourceSettings(hostfile=str(two_hosts)))
    assert found is not None
    assert found.ranks == 2
    with pytest.raises(FPOError, match=r"resources\.ranks=3, but .*hostfile has 2 slots"):
        run_hosts(ResourceSettings(hostfile=str(two_hosts), ranks=3))
    with pytest.raises(FPOError, match=r"'/no/hostfile' cannot be read"):
        run_hosts(ResourceSettings(hostfile="/no/hostfile"))


def on_hosts(spec, hostfile, on_step=lambda _record: None, **resources):
    hosts = run_hosts(ResourceSettings(hostfile=str(hostfile), **resources))
    assert hosts is not None
    run_workers(spec, hosts.ranks, on_step, hosts=hosts)


@pytest.mark.slow
def test_two_hosts_give_the_weights_of_one(caches, tmp_path, two_hosts):
    _, weights = train(caches, tmp_path / "one", ranks=2, zero_stage=2)
    spec = job(caches, tmp_path / "two", zero_stage=2)
    on_hosts(spec, two_hosts)
    there = load_file(spec.output / "model" / "model.safetensors")
    assert weights.keys() == there.keys()
    assert all(torch.equal(weights[name], there[name]) for name in weights)
    # Each "host" had a launcher of its own.
    said = (spec.output / "workers.log").read_text()
    assert "one: " in said
    assert "two: " in said


@pytest.mark.slow
def test_stopping_reaches_all_hosts_and_nothing_foreign(caches, tmp_path, two_hosts):
    """An interrupted stage: a checkpoint, no process left, other DeepSpeed runs undisturbed.

    DeepSpeed's launcher would end the other run, were it told to stop itself.
    """
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(300)",
         f"{sys.executable} -u -m deepspeed.launcher.launch"]  # what the pattern is
    )  # fmt: skip
    spec = job(caches, tmp_path / "out", epochs=100_000)

    def interrupt(record):
        if record["step"] == 3:
            assert len(ranks_of(tmp_path)) == 2
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            on_hosts(spec, two_hosts, interrupt)
        assert not worker_processes(tmp_path)
        (checkpoint,) = spec.checkpoints.glob("step-*")
        assert is_complete(checkpoint)
        assert (spec.output / "preempted.json").is_file()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_ranks_of_all_hosts_leave_when_their_stage_is_killed(caches, tmp_path, two_hosts):
    spec = job(caches, tmp_path / "out", epochs=100_000).model_copy(update={"patience": 7.0})
    spec.output.mkdir()
    spec.save(tmp_path / "spec.json")
    code = (
        "import sys, pathlib; from fpo_core.recipe.schema import ResourceSettings;"
        "from fpo_core.training.job import TrainingJob;"
        "from fpo_core.training.hosts import run_hosts;"
        "from fpo_core.training.launch import run_workers;"
        f"hosts = run_hosts(ResourceSettings(hostfile={str(two_hosts)!r}));"
        f"job = TrainingJob.load(pathlib.Path({str(tmp_path / 'spec.json')!r}));"
        "run_workers(job, 2, print, hosts=hosts)"
    )
    stage = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=ROOT)
    metrics = spec.output / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, 120)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    assert len(ranks_of(tmp_path)) == 2
    wait_for(lambda: not worker_processes(tmp_path), 30)


def test_a_rank_that_was_killed_on_a_host_is_said_to_be(tmp_path):
    """As DeepSpeed's launcher logged it there; the neighbour's error came of it."""
    (tmp_path / "workers.log").write_text(
        "two: [2026-11-25 09:41:16,402] [ERROR] [launch.py:341:sigkill_handler] ['/usr/bin/python',"
        " '-u', '-m', 'fpo_core.training.worker', '/out/job.json'] exits with return code = -9\n"
        "pdsh@here: two: ssh exited with exit code 247\n"
    )
    lost = {"time": 1.0, "message": None, "traceback": "RuntimeError: Connection closed by peer"}
    (tmp_path / "error-rank0.json").write_text(json.dumps(lost))
    said = str(failure(tmp_path, 247))
    assert "were killed, most likely for memory" in said
    assert "The same command goes on from the last checkpoint" in said


def as_rank_0(*arguments: str, **environment: object) -> subprocess.CompletedProcess[str]:
    """A process that a launcher on another host would have started."""
    given = {name: str(value) for name, value in environment.items()}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **given},
    )  # fmt: skip


@pytest.mark.slow
def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = "from fpo_core.training.engine import start_distributed as s; s()"
        done = as_rank_0("-c", code, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert re.search(
        rf"FPOError: port {port} is in use on \S+, .*resources\.master_port", done.stderr
    )


@pytest.mark.slow
def test_a_host_without_the_jobs_folder_is_named(tmp_path):
    """What the rank says there, and what the stage makes of it."""
    gone = tmp_path / "not-mounted" / "job.json"
    done = as_rank_0("-m", "fpo_core.training.worker", str(gone))
    assert done.returncode == 1
    (tmp_path / "workers.log").write_text("".join(f"two: {line}\n" for line in
                                                  done.stderr.splitlines()))  # fmt: skip
    told = str(failure(tmp_path, 1))
    assert told.startswith(f"cannot start on the host {socket.gethostname()}: {gone} cannot be ")
    assert "same paths" in told


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)
