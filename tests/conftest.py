"""What all tests share: quiet libraries, a Prefect of their own, the ``fpo`` command."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fpo_core.quiet import set_quiet_defaults
from tests.object_store import seaweed

__all__ = ["seaweed"]  # one object store for all tests

set_quiet_defaults()
# Started in a script's background, a process ignores Ctrl-C, and so do all that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["PREFECT_LOGGING_LEVEL"] = "CRITICAL"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FPO_LOG"] = "INFO"
os.environ.pop("FPO_STORE", None)


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


# Minutes in one file: begun last, it would keep one process busy after the other has ended.
FIRST = "test_interrupted.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != FIRST)


@pytest.fixture(scope="session", autouse=True)
def prefect_home(tmp_path_factory) -> Iterator[None]:
    """Prefect's database and profiles in a folder of this session, also for processes it starts."""
    before = os.environ.get("PREFECT_HOME")
    os.environ["PREFECT_HOME"] = str(tmp_path_factory.mktemp("prefect"))
    yield
    if before is None:
        del os.environ["PREFECT_HOME"]
    else:
        os.environ["PREFECT_HOME"] = before


@pytest.fixture(scope="session")
def prefect_server(prefect_home) -> Iterator[None]:
    """A real Prefect server on SQLite, one for all flows that run inside the test process."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def served(prefect_server) -> Iterator[None]:
    """Processes that a module's tests start use this server, too, rather than each its own."""
    from prefect.settings import PREFECT_API_URL

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        yield


class FinishedRun(NamedTuple):
    """A tiny recipe that ran to its end, for tests that only read; others copy the store."""

    recipe: Path
    store: Path
    report: Path


@pytest.fixture(scope="session")
def finished_run(prefect_server, tmp_path_factory) -> FinishedRun:
    """``fpo run`` on a random model of three layers: every stage, real workers included."""
    from cli.main import main
    from tests.tiny import save_recipe

    folder = tmp_path_factory.mktemp("run")
    run = FinishedRun(save_recipe(folder), folder / "store", folder / "report")
    with pytest.raises(SystemExit) as left:
        main(["run", str(run.recipe), "--store", str(run.store), "--report", str(run.report)])
    assert not left.value.code
    return run


@pytest.fixture
def fpo(prefect_server, capfd) -> Callable[..., Result]:
    """Run the ``fpo`` command in this process."""
    from cli.main import main

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch) -> Iterator[Path]:
    """W&B writes into a folder; it remembers its settings for the process, so they are dropped."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "sent"))
    (tmp_path / "sent").mkdir()
    yield tmp_path / "sent"
    wandb.teardown()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, mounted for the test. Takes root, as CI has it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
