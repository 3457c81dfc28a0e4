"""Compare the objectives on one recipe's held-out pairs, from one set of caches.

    python -m benchmarks.methods --recipe quickstart --seeds 0 1 2

Every run is an ordinary ``fpo run`` with ``train.method`` and ``train.seed`` set, so what is stored
already is reused and an interrupted comparison goes on where it stopped. Prints a Markdown table:
mean over the seeds, and the smallest and largest in brackets; then each
method's accuracy against the reference's, and the last one's against each of the others'.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from fpo_core.evaluation.metrics import Estimate, bootstrap_draws, estimate
from fpo_core.quiet import set_quiet_defaults
from fpo_core.recipe import load_recipe
from storage.artifact import Artifact
from storage.location import open_store
from storage.store import Store
from tasks.plan import make_plan

METHODS = ("dpo", "simpo", "fpo")
RESAMPLES = 5000


class Column(NamedTuple):
    """One column of the table."""

    key: str  # of the metric
    title: str
    digits: int


COLUMNS = (
    Column("accuracy", "accuracy", 3),
    Column("reward_accuracy", "reward accuracy", 3),
    Column("margin", "margin, nats a token", 3),
    Column("kl_chosen", "KL chosen, nats", 2),
    Column("kl_rejected", "KL rejected, nats", 2),
    Column("discrepancy", "feature discrepancy", 3),
    Column("entropy", "entropy, nats", 3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE")
    parser.add_argument("--store", default="fpo-store")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    runs: dict[str, list[Artifact]] = {}
    for method in options.methods:
        for seed in options.seeds:
            overrides = [*options.set, f"train.method={method}", f"train.seed={seed}"]
            run(options.recipe, overrides, options.store, f"{method}-{seed}")
            runs.setdefault(method, []).append(evaluation(options.recipe, overrides, store))
    print(table({method: [metrics(found) for found in every] for method, every in runs.items()}))
    print()
    for method, every in runs.items():
        low = min(metrics(found)["accuracy"]["difference"]["low"] for found in every)
        print(
            f"accuracy, {method} minus the reference: every run's 95 % interval is above {low:+.3f}"
        )
    *others, last = runs
    for other in others:
        gap = accuracy_gap(runs[last], runs[other])
        print(
            f"accuracy, {last} minus {other}, same pairs, all seeds: {gap.value:+.3f} "
            f"({gap.low:+.3f} to {gap.high:+.3f}, 95 % bootstrap over pairs)"
        )


def run(recipe: str, overrides: list[str], store: str, name: str) -> None:
    """``fpo run`` in a process of its own, as a user would."""
    settings = [part for override in overrides for part in ("--set", override)]
    command = [
        sys.executable, "-m", "cli.main", "run", recipe, *settings, "--store", store,
        "--report", f"reports/methods/{name}",
    ]  # fmt: skip
    print("$ fpo", *command[3:], file=sys.stderr, flush=True)
    subprocess.run(command, check=True)


def evaluation(recipe: str, overrides: list[str], store: Store) -> Artifact:
    """The evaluation of a finished run."""
    planned = make_plan(load_recipe(recipe, overrides), store).stages["evaluate"]
    return store.artifact(planned.artifact, planned.version)


def metrics(found: Artifact) -> dict[str, dict]:
    """An evaluation's metrics, by key."""
    return {record["key"]: record for record in json.loads(found.path("metrics.json").read_text())}


def accuracy_gap(one: list[Artifact], other: list[Artifact]) -> Estimate:
    """Difference of two methods' accuracies, pair by pair and averaged over the seeds."""
    gaps = [_correct(a) - _correct(b) for a, b in zip(one, other, strict=True)]
    per_pair = np.mean(gaps, axis=0)
    return estimate(per_pair, bootstrap_draws(len(per_pair), RESAMPLES, seed=0))


def _correct(found: Artifact) -> np.ndarray:
    pairs = pl.read_parquet(found.path("pairs.parquet"))
    chosen, rejected = (
        pairs[f"policy_logps_{side}"] / pairs[f"tokens_{side}"] for side in ("chosen", "rejected")
    )
    return (chosen > rejected).to_numpy().astype(float)


def table(runs: dict[str, list[dict[str, dict]]]) -> str:
    """A Markdown table: the reference, then a line a method."""
    lines = [
        "| | " + " | ".join(column.title for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    first = next(iter(runs.values()))[0]
    lines.append("| reference | " + " | ".join(_before(first[c.key], c) for c in COLUMNS) + " |")
    for method, found in runs.items():
        cells = [_spread([r[c.key]["policy"]["value"] for r in found], c.digits) for c in COLUMNS]
        lines.append(f"| {method.upper()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _before(record: dict, column: Column) -> str:
    value = record["reference"]
    return "" if value is None else f"{value['value']:.{column.digits}f}"


def _spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    set_quiet_defaults()
    main()
