"""The supervised warm start: its loss, the model it makes, and that all later stages read that."""

import json
import re

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM

from cli.main import main
from storage.catalog import list_artifacts
from storage.location import open_store
from tests.tiny import save_recipe

ROWS = [
    {"messages": [{"role": "user", "content": "hello fox"},
                  {"role": "assistant", "content": "the quick brown fox"},
                  {"role": "user", "content": "and the dog?"},
                  {"role": "assistant", "content": "lazy"}]},
    {"instruction": "Name an animal", "input": "a small one", "output": "a fox, or a dog"},
    {"prompt": "Why?", "completion": "for the fox"},
]  # fmt: skip


@pytest.fixture(scope="module")
def warm(prefect_server, tmp_path_factory):
    """A finished run with a warm start on two ranks."""
    root = tmp_path_factory.mktemp("warm")
    data = root / "dialogues.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sft = {"data": [str(data)], "turns": "all", "lr": 1e-3, "warmup_steps": 0, "batch_size": 4,
           "epochs": 2}  # fmt: skip
    recipe = save_recipe(root, sft=sft, resources={"ranks": 2})
    with pytest.raises(SystemExit) as left:
        main(["run", str(recipe), "--store", str(root / "store"), "--report", str(root / "report")])
    assert not left.value.code
    opened = open_store(root / "store")
    found = {i.stage: opened.artifact(i.stage, i.version) for i in list_artifacts(opened)}
    return recipe, found


def plain_logps(model, rows):
    """Summed log-probs of the answers by transformers alone, an answer at a time."""
    sums = []
    for prompt, answer in rows:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logps = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
        sums.append(float(logps.gather(1, torch.tensor(answer)[:, None]).sum()))
    return sums


def rows_of(artifact, side):
    table = pl.concat([pl.read_parquet(path) for path in artifact.shard_paths()])
    return list(zip(table["prompt_ids"].to_list(), table[f"{side}_ids"].to_list(), strict=True))


@pytest.mark.slow
def test_the_loss_is_transformers_own_and_falls(warm):
    recipe, found = warm
    rows = rows_of(found["instructions"], "chosen")
    assert len(rows) == 4  # two answers of the dialogue, one each of the others
    assert rows_of(found["instructions"], "rejected")[0][1] == []
    base = AutoModelForCausalLM.from_pretrained(recipe.parent / "model")
    sums = plain_logps(base, rows)
    expected = -sum(s / len(answer) for s, (_, answer) in zip(sums, rows, strict=True)) / 4
    steps = pl.read_parquet(found["sft"].path("metrics.parquet"))
    assert steps["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert steps["loss"][-1] < steps["loss"][0]
    assert "accuracy" not in steps.columns


@pytest.mark.slow
def test_later_stages_read_the_model_it_made(warm):
    _, found = warm
    name = f"artifact:sft/{found['sft'].version}"
    for stage in ("reference", "features", "policy"):
        assert found[stage].manifest["inputs"]["model"] == name
    tuned = AutoModelForCausalLM.from_pretrained(found["sft"].folder("model"))
    cached = pl.concat([pl.read_parquet(p) for p in found["reference"].shard_paths()])
    for side in ("chosen", "rejected"):
        sums = plain_logps(tuned, rows_of(found["pairs"], side))
        assert cached[f"{side}_logp"].to_list() == pytest.approx(sums, rel=1e-5)
    first = pl.read_parquet(found["policy"].path("metrics.parquet")).row(0, named=True)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    card = found["sft"].path("model/README.md").read_text()
    assert "supervised-fine-tuning" in card


@pytest.mark.slow
def test_the_caches_of_one_warm_start_are_not_those_of_another(warm, fpo):
    recipe, found = warm
    store = recipe.parent / "store"
    plan = fpo("plan", recipe, "--store", store)
    assert plan.out.count("reuse") == 7
    other = fpo("plan", recipe, "--store", store, "--set", "sft.lr=0.01")
    assert other.out.count("reuse") == 2  # the pairs' tokens and the dialogues'
    assert found["sft"].version in plan.out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a fox"}, r"line 1: the row has no dialogue and no answer. It has 'text'"),
        ({"messages": [{"role": "user", "content": "fox?"}]}, "line 1: the dialogue has no answer"),
        ({"messages": [{"role": "assistant", "content": "fox"}]}, "begins with an assistant turn"),
        ({"prompt": "a", "completion": 3}, "'completion' is a number, expected text"),
    ],
)
def test_data_that_is_none_is_named(fpo, tmp_path, row, message):
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps(row) + "\n")
    recipe = save_recipe(tmp_path / "r", sft={"data": [str(data)]})
    result = fpo("run", recipe, "--store", tmp_path / "store", "--only", "instructions")
    assert result.code == 1
    assert "Traceback" not in result.err
    assert re.search(message, " ".join(result.err.split())), result.err
