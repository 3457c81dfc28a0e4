"""A benchmark's pack: a folder with its questions, baseline answers, judge prompts and rules."""

from pathlib import Path
from typing import NamedTuple


class Pack(NamedTuple):
    """A pack that was read and checked."""

    name: str  # such as "arena-hard-v0.1"
    kind: str  # "alpaca_eval", "arena_hard", "mt_bench" or "ifeval"
    folder: Path
    files: dict[str, Path]  # by role: "questions", "baseline", "references", "judge", …
    digest: str  # sha256 over the contents of all files
