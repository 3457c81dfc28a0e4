"""Writes requirements.lock and requirements-nodeps.lock from pyproject.toml: `make lock`.

The pins are what a fresh environment really got, frozen after it was installed and checked: `pip
check`, and an import of the packages that have broken each other before. Local version labels such
as +cpu are dropped: the lock then fits a machine whose index serves another build of torch.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import setup_env

HEADER = """\
# Made by `make lock` (scripts/lock.py) from pyproject.toml with Python {python}: what a fresh
# environment got. Do not edit; change the ranges in pyproject.toml and make it again.
"""
NODEPS_HEADER = HEADER + "# Installed without their dependencies: pyproject.toml says why.\n"
MUST_IMPORT = (
    "prefect.server.api.server, torch, transformers, deepspeed, sae_lens, polars, boto3, altair"
)


def pinned(freeze: str) -> list[str]:
    """The lines of `pip freeze`, less comments and local version labels.

    Raises:
        ValueError: a package came from a file or an address, which no other machine has.
    """
    lines = [line for line in freeze.splitlines() if line and not line.startswith("#")]
    for line in lines:
        if not re.fullmatch(r"[\w.-]+==[\w.!+-]+", line):
            raise ValueError(f"not a plain pin, so it cannot be locked: {line}")
    return sorted((line.partition("+")[0] for line in lines), key=str.lower)


def name_of(requirement: str) -> str:
    """The normalised project name of a requirement or pin."""
    name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


class Environment:
    """A throw-away virtual environment."""

    def __init__(self, folder: Path, base_python: str) -> None:
        self.python = folder / "bin" / "python"
        subprocess.run([base_python, "-m", "venv", folder], check=True)

    def run(self, *arguments: str | Path) -> str:
        """Runs its Python and returns what that prints."""
        return subprocess.run(
            [self.python, *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env=setup_env.child_environment(),
        ).stdout

    def install(self, *arguments: str | Path) -> None:
        """Installs with pip; its errors go to the terminal."""
        self.run("-m", "pip", "install", "-qq", "--no-input", "--no-compile", *arguments)


def make_lock(work: Path) -> None:
    """Resolves the ranges, checks the result and writes both lock files."""
    pyproject = tomllib.loads(setup_env.PYPROJECT.read_text(encoding="utf-8"))
    rules = pyproject["tool"]["fpo"]["lock"]
    project = pyproject["project"]
    wanted, constraints = work / "wanted.txt", work / "constraints.txt"
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted.write_text("\n".join(itertools.chain.from_iterable(groups)))
    constraints.write_text("\n".join(rules["constraints"]))

    env = Environment(work / "venv", setup_env.find_python()[0])
    with setup_env.timed("pip, build tools, " + ", ".join(rules["constraints"])):
        env.install("--upgrade", *setup_env.BUILD_TOOLS)
        env.install("-c", constraints, *rules["constraints"])
    with setup_env.timed("everything else, newest within the ranges"):
        env.install("--no-build-isolation", "-c", constraints, "-r", wanted)
    with setup_env.timed("checks"):
        env.run("-m", "pip", "check")
        env.run("-c", f"import {MUST_IMPORT}")
    with setup_env.timed("packages without dependencies"):
        env.install("--no-deps", *rules["no-deps"])

    python = env.run("-c", "import platform; print(platform.python_version())").strip()
    apart = {name_of(requirement) for requirement in rules["no-deps"]}
    pins = pinned(env.run("-m", "pip", "freeze", "--all"))
    for path, header, of_this_file in (
        (setup_env.LOCK, HEADER, [pin for pin in pins if name_of(pin) not in apart]),
        (setup_env.NODEPS_LOCK, NODEPS_HEADER, [pin for pin in pins if name_of(pin) in apart]),
    ):
        partial = path.with_suffix(".partial")
        partial.write_text(header.format(python=python) + "\n".join(of_this_file) + "\n")
        os.replace(partial, path)
        print(f"{path.name}: {len(of_this_file)} pins", file=sys.stderr)


def main() -> int:
    """Makes the lock; a failed step leaves the old one as it is."""
    print("lock: resolving in a fresh environment; some minutes", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="fpo-lock-") as work:
            make_lock(Path(work))
    except subprocess.CalledProcessError as error:
        step = " ".join(map(str, error.cmd[1:4]))
        return setup_env.fail(f"the lock was not changed: {step} failed.")
    except (setup_env.SetupError, ValueError) as error:
        return setup_env.fail(f"the lock was not changed: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
