"""The shipped preference data is what its README says: enough, varied, and not told by length."""

import json
from collections import Counter
from pathlib import Path

import pytest

from fpo_core.models.load import load_tokenizer, model_folder
from fpo_core.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "data" / "quickstart"


def rows(split):
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def test_enough_distinct_pairs_on_many_topics():
    train, heldout = rows("train"), rows("heldout")
    assert len(train) >= 160
    assert len(heldout) >= 48
    prompts = [row["prompt"].lower() for row in train + heldout]
    assert len(set(prompts)) == len(prompts)
    topics = Counter(row["topic"] for row in train)
    assert len(topics) >= 16
    assert set(topics) == {row["topic"] for row in heldout}


@pytest.mark.slow  # converts the quickstart's model when it is not in the cache yet
def test_length_does_not_tell_chosen_from_rejected():
    tokenizer = load_tokenizer(model_folder(load_recipe("quickstart").model.source))
    lengths = [
        [len(tokenizer(row[side])["input_ids"]) for side in ("chosen", "rejected")]
        for row in rows("train") + rows("heldout")
    ]
    means = [sum(side) / len(lengths) for side in zip(*lengths, strict=True)]
    longer = sum(chosen > rejected for chosen, rejected in lengths) / len(lengths)
    # What recipes/data/quickstart/README.md reports.
    assert [round(mean, 1) for mean in means] == [34.2, 33.5]
    assert round(longer, 2) == 0.47
    assert max(max(pair) for pair in lengths) < 120
