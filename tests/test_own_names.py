"""Folders with a ``storage.py`` or ``tasks.py`` of their own do not hide our packages."""

import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import prefect.runner
import pytest

from fpo_core.own_names import OWN_NAMES, ROOT

HOOKS = Path(prefect.runner.__file__).parent  # Prefect runs hooks from here


@pytest.fixture
def decoys(tmp_path) -> Path:
    """A folder with a module of each name, which must not be imported."""
    for name in OWN_NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the decoy was imported')\n")
    return tmp_path


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    more = {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **more},
        input="{}",
    )


LOAD = """
from prefect.flows import load_flow_from_entrypoint
flow = load_flow_from_entrypoint("fpo_core.deployed.fpo_pipeline", use_placeholder_flow=False)
import cli, explorer, flows, storage.lineage, tasks.run
print(flow.name, *(m.__file__ for m in (cli, explorer, flows, storage, tasks)))
"""


@pytest.mark.parametrize("place", ["cwd", "PYTHONPATH", "both"])
def test_a_flow_is_loaded_next_to_decoys(decoys, tmp_path_factory, place):
    path = None if place == "cwd" else decoys
    cwd = tmp_path_factory.mktemp("empty") if place == "PYTHONPATH" else decoys
    done = python("-c", LOAD, cwd=cwd, path=path)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [str(ROOT / name / "__init__.py") for name in OWN_NAMES]
    assert done.stdout.split() == ["fpo-pipeline", *ours]


def test_a_script_in_the_folder_of_prefects_hooks_loads_our_flow(tmp_path):
    assert (HOOKS / "storage.py").is_file()
    script = tmp_path / "hook.py"
    script.write_text(f"import sys\nsys.path[0] = {str(HOOKS)!r}\n{LOAD}")
    done = python(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_programs_that_are_started_by_name_pass_the_decoys(decoys):
    cell = python("-m", "fpo_core", "flows.cell", cwd=decoys, path=decoys)
    assert "TypeError" in cell.stderr  # it read its job: {} names no recipe
    assert "the decoy" not in cell.stderr
    script = "import sys; from fpo_core.__main__ import fpo; sys.argv[1:] = ['--help']; fpo()"
    command = python("-c", script, cwd=decoys, path=decoys)
    assert command.returncode == 0, command.stderr
    assert "fpo run quickstart" in command.stdout


def test_ours_hide_nothing_that_is_installed():
    installed = packages_distributions()
    assert {name: installed.get(name) for name in OWN_NAMES} == dict.fromkeys(
        OWN_NAMES, ["fpo-pipeline"]
    )
