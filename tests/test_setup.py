"""The set-up, run for real in folders of its own: tiny packages, odd Pythons, no network.

To be quick, most trees are set up by a stand-in for Python whose venv borrows this environment's
pip instead of unpacking one; one slow test does all of it with the real thing.
"""

import ast
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pip
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
BASE_PYTHON = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")

PYPROJECT = """\
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "stub"
version = "1"
requires-python = ">=3.11,<3.14"
"""

# Makes the wheel of an editable install with no build tool; a file `slow` lets a test interrupt it.
BACKEND = """\
import pathlib, time, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    if pathlib.Path("slow").exists():
        pathlib.Path("building").touch()
        time.sleep(60)
    metadata = "Metadata-Version: 2.1\\nName: stub\\nVersion: 1\\n"
    kind = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
    with zipfile.ZipFile(pathlib.Path(folder, "stub-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("stub.pth", str(pathlib.Path.cwd()))
        wheel.writestr("stub-1.dist-info/METADATA", metadata)
        wheel.writestr("stub-1.dist-info/WHEEL", kind)
        wheel.writestr("stub-1.dist-info/RECORD", "")
    return "stub-1-py3-none-any.whl"
"""

BORROWS_PIP = f"""\
if [ "$1 $2" = "-m venv" ]; then
    "{BASE_PYTHON}" -m venv --without-pip "$3" || exit
    exec "{sys.executable}" -c 'import os, sys; os.symlink(*sys.argv[1:])' \\
        "{Path(pip.__file__).parent}" "$3/lib/python3.{sys.version_info.minor}/site-packages/pip"
fi
exec "{BASE_PYTHON}" "$@"
"""


def failing_venv(words: str) -> str:
    return f"""\
if [ "$1 $2" = "-m venv" ]; then echo "{words}"; exit 1; fi
exec "{BASE_PYTHON}" "$@"
"""


# What Debian's Python says without the package python3-venv.
DEBIAN_WITHOUT_VENV = failing_venv(
    "The virtual environment was not created successfully because ensurepip is not available. On "
    "Debian/Ubuntu systems, you need to install the python3-venv package"
)

# Answers as Python 3.8 does, and runs scripts under a Python that takes itself for 3.8.
PYTHON_38 = f"""\
case "$*" in
    *print*) echo 3 8 ;;
    "-c ") ;;
    *) exec "{BASE_PYTHON}" -c 'import runpy, sys
sys.argv = sys.argv[1:]
sys.version_info = (3, 8, 18, "final", 0)
runpy.run_path(sys.argv[0], run_name="__main__")' "$@" ;;
esac
"""


class Tree:
    """A stub project with the real scripts, and a PATH on which only the given Pythons are."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.bin = folder / "bin"
        self.wheels = folder / "wheels"
        for made in (self.root, self.bin, self.wheels):
            made.mkdir()
        shutil.copytree(
            SCRIPTS, self.root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
        )
        self.write("pyproject.toml", PYPROJECT)
        self.write("backend.py", BACKEND)
        self.write("requirements.lock", "# no packages\n")
        self.write("requirements-nodeps.lock", "# no packages\n")
        self.state = self.root / ".venv" / ".set-up"
        self.environment = {
            "PATH": str(self.bin),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
        }

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def add_python(self, name: str, body: str) -> Path:
        program = self.bin / name
        program.write_text("#!/bin/sh\n" + body)
        program.chmod(0o755)
        return program

    def add_wheel(self, name: str, version: str) -> None:
        """Offers a package whose only module holds its version."""
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(self.wheels / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", f"version = '{version}'\n")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")

    def start(self, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["/bin/sh", "scripts/run_python", "scripts/setup_env.py"],
            cwd=self.root,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def set_up(self, **environment: str) -> tuple[int, str]:
        """Runs the set-up; returns its exit status and all it printed."""
        process = self.start(**environment)
        output, _ = process.communicate(timeout=120)
        return process.returncode, output

    def ask(self, code: str) -> str:
        """What the environment's Python prints."""
        python = self.root / ".venv" / "bin" / "python"
        return subprocess.check_output([python, "-c", code], cwd="/", text=True).strip()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def assert_one_sentence(output: str, *parts: str) -> None:
    """The last line is the whole error: what is wrong and what to do, no traceback above it."""
    assert "Traceback" not in output
    last = output.splitlines()[-1]
    assert last.startswith("set-up: ")
    assert last.endswith(".")
    for part in parts:
        assert part in last


# ---- what a set-up does ------------------------------------------------------------------------


def test_installs_the_lock_then_does_nothing_until_it_changes(tree: Tree) -> None:
    tree.add_python("python3", BORROWS_PIP)
    tree.add_wheel("tiny", "1.0")
    tree.add_wheel("tiny", "1.1")
    tree.add_wheel("alone", "2.0")
    tree.write("requirements.lock", "tiny==1.0\n")
    tree.write("requirements-nodeps.lock", "alone==2.0\n")

    status, output = tree.set_up()
    assert status == 0, output
    assert "making .venv" in output
    assert "  1 packages ... " in output
    assert re.search(r"set-up: done in \d+ s\n$", output)
    assert tree.ask("import tiny, alone; print(tiny.version, alone.version)") == "1.0 2.0"
    assert tree.ask("import backend; print(backend.__file__)") == str(tree.root / "backend.py")

    assert tree.set_up() == (0, "")  # without a word: nothing was done

    kept = tree.root / ".venv" / "kept"
    kept.touch()
    tree.write("requirements.lock", "tiny==1.1\n")
    status, output = tree.set_up()
    assert status == 0, output
    assert "bringing .venv in line" in output
    assert tree.ask("import tiny; print(tiny.version)") == "1.1"
    assert kept.exists()


def test_starts_over_after_an_interruption(tree: Tree) -> None:
    tree.add_python("python3", BORROWS_PIP)
    tree.write("slow", "")
    process = tree.start()
    deadline = time.monotonic() + 60
    while not (tree.root / "building").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert_one_sentence(output, "interrupted", "starts over")

    left_behind = tree.root / ".venv" / "half"
    left_behind.touch()
    (tree.root / "slow").unlink()
    status, output = tree.set_up()
    assert status == 0, output
    assert "making .venv" in output
    assert not left_behind.exists()
    assert tree.set_up() == (0, "")


def test_makes_a_broken_or_moved_environment_anew(tree: Tree) -> None:
    tree.add_python("python3", BORROWS_PIP)
    broken = tree.root / ".venv" / "bin"
    broken.mkdir(parents=True)
    (broken / "python").symlink_to(tree.root / "removed-by-an-upgrade")
    status, output = tree.set_up()
    assert status == 0, output
    assert "making .venv" in output

    moved = tree.root.with_name("moved")
    tree.root.rename(moved)
    tree.root = moved
    status, output = tree.set_up()
    assert status == 0, output
    assert tree.ask("import backend; print(backend.__file__)") == str(moved / "backend.py")


def test_waits_for_another_set_up_of_the_same_tree(tree: Tree) -> None:
    tree.add_python("python3", DEBIAN_WITHOUT_VENV)
    with (tree.root / "pyproject.toml").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = tree.start()
        assert process.stdout is not None
        assert "waiting for another set-up" in process.stdout.readline()
        assert not (tree.root / ".venv").exists()
    process.communicate(timeout=60)
    assert (tree.root / ".venv").exists()


@pytest.mark.slow
def test_works_with_the_real_venv(tree: Tree) -> None:
    (tree.bin / "python3").symlink_to(BASE_PYTHON)
    tree.add_wheel("tiny", "1.0")
    tree.write("requirements.lock", "tiny==1.0\n")
    status, output = tree.set_up()
    assert status == 0, output
    assert tree.ask("import tiny; print(tiny.version)") == "1.0"
    assert tree.set_up() == (0, "")


# ---- what it says when it cannot ---------------------------------------------------------------


def test_no_python(tree: Tree) -> None:
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, "no python3 on the PATH", "install Python 3.11", "PYTHON=")


def test_python_too_old(tree: Tree) -> None:
    old = tree.add_python("python3", PYTHON_38)
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, f"{old} is Python 3.8", "needs Python 3.11 to 3.13", "PYTHON=")
    assert not (tree.root / ".venv").exists()


def test_python_too_new(tree: Tree) -> None:
    new = tree.add_python(
        "python3", PYTHON_38.replace("echo 3 8", "echo 3 14").replace("8, 18", "14, 0")
    )
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, f"{new} is Python 3.14", "needs Python 3.11 to 3.13")


def test_supported_python_beside_an_old_one_is_found(tree: Tree) -> None:
    tree.add_python("python3", PYTHON_38)
    supported = tree.add_python("python3.12", DEBIAN_WITHOUT_VENV)
    _, output = tree.set_up()
    assert f"making .venv with {supported}" in output


def test_python_override_is_used_or_refused(tree: Tree) -> None:
    tree.add_python("python3", PYTHON_38)
    chosen = tree.add_python("elsewhere", DEBIAN_WITHOUT_VENV)
    assert f"making .venv with {chosen}" in tree.set_up(PYTHON=str(chosen))[1]

    status, output = tree.set_up(PYTHON="nowhere/python")
    assert status == 2
    assert_one_sentence(output, "PYTHON=nowhere/python is not a Python that runs")


def test_venv_module_missing(tree: Tree) -> None:
    python = tree.add_python("python3", DEBIAN_WITHOUT_VENV)
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, f"{python} has no venv module", "python3-venv")


def test_disk_full(tree: Tree) -> None:
    tree.add_python("python3", failing_venv("OSError: [Errno 28] No space left on device"))
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, "the disk is full", "free some space")


def test_no_network_is_told_from_a_missing_package(tree: Tree) -> None:
    tree.add_python("python3", BORROWS_PIP)
    tree.write("requirements.lock", "tiny==1.0\n")
    status, output = tree.set_up(
        PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9/", PIP_RETRIES="0", PIP_FIND_LINKS=""
    )
    assert status == 2
    assert_one_sentence(output, "package index cannot be reached", "check the network")

    tree.add_wheel("tiny", "0.9")
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, "package index has no tiny==1.0", "it offers: 0.9", "make lock")


def test_folder_that_cannot_be_written(tree: Tree) -> None:
    tree.add_python("python3", BORROWS_PIP)
    tree.write(".venv", "a file where the folder should go")
    status, output = tree.set_up()
    assert status == 2
    assert_one_sentence(output, ".venv")


# ---- the files that it works from --------------------------------------------------------------


def test_entry_check_parses_on_old_pythons() -> None:
    ast.parse((SCRIPTS / "setup_env.py").read_text(), feature_version=(3, 6))


def test_lock_holds_plain_pins_that_satisfy_pyproject() -> None:
    pins = {}
    for name in ("requirements.lock", "requirements-nodeps.lock"):
        for line in (ROOT / name).read_text().splitlines():
            if not line.startswith("#"):
                found = re.fullmatch(r"([\w.-]+)==([\w.!]+)", line)
                assert found, f"{name}: not a plain pin: {line}"
                pins[re.sub(r"[-_.]+", "-", found[1]).lower()] = found[2]
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, rules = pyproject["project"], pyproject["tool"]["fpo"]["lock"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for line in [*declared, *rules["no-deps"], *rules["constraints"]]:
        requirement = Requirement(line)
        assert pins[requirement.name] in requirement.specifier, f"{line}: run `make lock`"


def test_lock_drops_local_labels_and_refuses_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    import lock

    assert lock.pinned("# note\ntorch==2.13.0+cpu\nAltair==6.3.0\n") == [
        "Altair==6.3.0",
        "torch==2.13.0",
    ]
    with pytest.raises(ValueError, match="cannot be locked: tiny @ file"):
        lock.pinned("tiny @ file:///somewhere/tiny.whl\n")


def test_make_help_lists_every_target() -> None:
    listed = subprocess.check_output(["make", "-C", ROOT, "--no-print-directory"], text=True)
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    assert targets == {line.split()[0] for line in listed.splitlines()[1:]}
