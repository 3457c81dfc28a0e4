"""Holding a behaviour by its features: numbered lists, on the quickstart's model.

    python -m benchmarks.control [--folder control] [--files]

Makes pairs of the quickstart's in which only the rejected answers are lists, and the recipe
`plain.yaml` that trains on them; then trains with groups of features held: those that ``fpo cache
find`` gives for lists, those that the plain training moved most, and, for comparison, as many that
come after them; and with nothing held at a lower rate. Prints a Markdown table: lists in sampled
answers to held-out prompts that ask for one, what the policy learnt, how far it went, how far the
features of lists moved and how far all others (root mean squares), and how many moved. Every run is
an ordinary ``fpo run``; all take about 40 minutes on two cores.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import yaml

from benchmarks.methods import evaluation, metrics, run
from explorer.find import find_features, read_texts
from fpo_core.evaluation.audit import RATE
from fpo_core.quiet import set_quiet_defaults
from storage.location import open_store
from tasks.run import prepare_run

DATA = Path("recipes/data/quickstart")
ASK = " Give three points as a numbered list."
SENTENCE_END = re.compile(r"(?<=[.!?]) ")
ITEM = re.compile(r"^\s*\d+[.)] ", re.MULTILINE)
SIZE = 60  # features of a group
METRICS = (("accuracy", 3), ("margin", 3), ("kl_chosen", 2), ("kl_rejected", 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("control"), help="for its files")
    parser.add_argument("--store", default="fpo-store")
    parser.add_argument("--files", action="store_true", help="write the files alone")
    options = parser.parse_args(arguments)
    recipe = write_recipe(options.folder)
    if options.files:
        return
    run(recipe, [], options.store, "control-plain")
    moved, next_moved = most_moved(recipe, options.store)
    lists = of_lists(recipe, options)
    variants = {
        "nothing held": [],
        "10 features of lists, weight 100": [held(lists, 100)],
        "10 features of lists, weight 1000": [held(lists, 1000)],
        "the 60 that moved most, weight 10": [held(moved, 10)],
        "the 60 that moved most, weight 100": [held(moved, 100)],
        "the next 60, weight 10": [held(next_moved, 10)],
        "nothing held, `train.lr=4e-6`": ["train.lr=4e-6"],
    }
    print(
        "| | answers with a list | items an answer | accuracy | margin | KL chosen | KL rejected "
        "| lists' change | all others' | moved |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for number, (name, overrides) in enumerate(variants.items()):
        run(recipe, overrides, options.store, f"control-{number}")
        artifact = evaluation(recipe, overrides, open_store(options.store))
        answers = pl.read_parquet(artifact.path("answers.parquet"))
        if number == 0:
            print(f"| the reference | {' | '.join(lists_in(answers['before']))} |" + " |" * 7)
        found = metrics(artifact)
        cells = [*lists_in(answers["after"])]
        cells += [f"{found[key]['policy']['value']:.{digits}f}" for key, digits in METRICS]
        cells += what_moved(pl.read_parquet(artifact.path("audit.parquet")), lists)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def write_recipe(folder: Path) -> str:
    """The pairs, and the recipe that trains on them.

    Returns:
        The recipe's file.
    """
    folder.mkdir(exist_ok=True)
    texts: dict[str, list[str]] = {"lists": [], "prose": []}
    for split in ("train", "heldout"):
        lines = (DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for pair in map(json.loads, lines):
                listed = as_list(pair["rejected"])
                if split == "train":
                    texts["lists"].append(listed)
                    texts["prose"].append(pair["rejected"])
                row = {"prompt": pair["prompt"] + ASK, "chosen": pair["chosen"], "rejected": listed}
                file.write(json.dumps(row) + "\n")
    for name, rows in texts.items():
        written = "".join(json.dumps({"text": text}) + "\n" for text in rows)
        (folder / f"{name}.jsonl").write_text(written, encoding="utf-8")
    recipe = {
        "base": "quickstart", "name": "control-plain",
        "data": {name: [str(folder / f"{name}.jsonl")] for name in ("train", "heldout")},
        "evaluation": {"prompts": 56, "max_new_tokens": 96},
        "monitor": {"heldout_steps": 0},
    }  # fmt: skip
    file = folder / "plain.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return str(file)


def as_list(text: str) -> str:
    """A text's sentences as the items of a numbered list."""
    sentences = SENTENCE_END.split(text)
    return "\n".join(f"{number}. {one}" for number, one in enumerate(sentences, 1))


def most_moved(recipe: str, store: str) -> tuple[list[int], list[int]]:
    """The features that a run moved most on either side, and as many that come next."""
    table = pl.read_parquet(evaluation(recipe, [], open_store(store)).path("audit.parquet"))
    features = table.sort(pl.col("change").abs(), descending=True)["feature"]
    ranked = features.unique(maintain_order=True).to_list()
    return sorted(ranked[:SIZE]), sorted(ranked[SIZE : 2 * SIZE])


def of_lists(recipe: str, options: argparse.Namespace) -> list[int]:
    """Features that fire in lists and not in the same text as prose."""
    texts = [read_texts(options.folder / f"{name}.jsonl") for name in ("lists", "prose")]
    prepared, _ = prepare_run(recipe, [], options.store, only="tokenize")
    return find_features(prepared, *texts)["feature"].head(10).to_list()


def held(features: list[int], weight: float) -> str:
    """The override that holds a group."""
    group = {"name": "lists", "features": features, "weight": weight}
    return f"train.groups={json.dumps([group])}"


def lists_in(answers: pl.Series) -> tuple[str, str]:
    """How many answers have an item of a numbered list, and the mean number of items."""
    items = [len(ITEM.findall(answer)) for answer in answers]
    having = sum(count > 0 for count in items)
    return f"{having} of {len(items)}", f"{sum(items) / len(items):.2f}"


def what_moved(features: pl.DataFrame, group: list[int]) -> list[str]:
    """How far the group's features moved and how far the others, as root mean squares; how many."""
    inside = pl.col("feature").is_in(group)
    moved = [
        features.filter(which).select((pl.col("change") ** 2).mean().sqrt()).item()
        for which in (inside, ~inside)
    ]
    count = features.filter(pl.col("q") < RATE).height
    return [*(f"{one:.3f}" for one in moved), f"{count:,} of {features.height:,}"]


if __name__ == "__main__":
    set_quiet_defaults()
    main()
