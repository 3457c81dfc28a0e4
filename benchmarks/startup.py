"""Seconds from the start of the train task to its first step, beside a bare process's start.

    python -m benchmarks.startup --rounds 3

The quickstart on eight pairs. ``bare`` is a process that imports torch, transformers and
deepspeed and loads the same model in float32, from its start to its end. ``train`` is what the
stage records as ``seconds_to_first_step``: its inputs checked, the ranks started, their imports,
model, SAE, caches and engine. In turn, in one run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fpo_core.models.load import model_folder
from fpo_core.quiet import set_quiet_defaults
from fpo_core.recipe import load_recipe
from storage.catalog import list_artifacts
from storage.location import open_store

BARE = """
import sys, torch, transformers, deepspeed
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
"""


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    set_quiet_defaults()
    folder = str(model_folder(load_recipe("quickstart").model.source))
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(temporary) / "store"
        for stage in ("tokenize", "reference", "features"):
            _fpo(store, options.ranks, "--only", stage)
        rounds = [(_bare(folder), _train(store, options.ranks)) for _ in range(options.rounds)]
    print("| | median s | smallest | largest |\n|---|---|---|---|")
    bare, train = zip(*rounds, strict=True)
    more = [ours - base for base, ours in rounds]
    for name, seconds in (("bare", bare), ("train", train), ("train - bare", more)):
        print(f"| {name} | {statistics.median(seconds):.1f} | {min(seconds):.1f} | "
              f"{max(seconds):.1f} |")  # fmt: skip


def _fpo(store: Path, ranks: int, *more: str) -> None:
    command = [
        sys.executable, "-m", "cli.main", "run", "quickstart", "--store", str(store), *more,
        "--set", "data.limit=8", "--set", f"resources.ranks={ranks}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _bare(folder: str) -> float:
    started = time.perf_counter()
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", BARE, folder], check=True, env=environment,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - started


def _train(store: Path, ranks: int) -> float:
    _fpo(store, ranks, "--only", "train", "--force")
    opened = open_store(store)
    (policy,) = (info for info in list_artifacts(opened) if info.stage == "policy")
    stats = opened.artifact("policy", policy.version).manifest["stats"]
    return stats["seconds_to_first_step"]


if __name__ == "__main__":
    main()
