"""Where an artifact was made: versions and host. Never a path, never the environment."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "fpo-pipeline", "torch", "transformers", "sae-lens", "deepspeed", "prefect", "pyarrow",
    "polars", "numpy",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Package versions, Python, platform, host name and git commit, for a manifest."""
    return {
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        "host": platform.node(),
        "git_commit": _git_commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit this code is at, with a ``+`` when the working tree has changes."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed arguments
        ["git", *arguments],  # noqa: S607 - git from PATH, as the user has it
        cwd=folder, capture_output=True, text=True, check=True, timeout=10,
    )  # fmt: skip
    return done.stdout.strip()
