"""Estimates, against what libraries count: parameters, operations, stored bytes, recorded rates."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from fpo_core.models.shape import PUBLISHED, model_shape
from fpo_core.recipe import load_recipe
from storage.location import open_store
from tasks.estimate import H100_FLOPS, UTILIZATION, Estimates, WhatIf, estimate_plan
from tasks.plan import make_plan
from tasks.texts import SAMPLE_ROWS, pair_texts
from tests.tiny import make_model, save_pairs, save_recipe, save_sae

NOTHING = WhatIf()
# What google/gemma-2-2b's config.json has beside the defaults of its class.
GEMMA2_2B = {
    "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "head_dim": 256,
    "num_key_value_heads": 4, "intermediate_size": 9216,
}  # fmt: skip


def estimated(path, store, *overrides: str, what_if: WhatIf = NOTHING) -> Estimates:
    recipe, opened = load_recipe(str(path), overrides), open_store(store)
    return estimate_plan(recipe, make_plan(recipe, opened), opened, what_if)


def by_stage(estimates: Estimates) -> dict:
    return {stage.stage: stage for stage in estimates.stages}


def parameters(config) -> int:
    """As transformers makes the model, norms and biases (vectors) left out."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters() if p.ndim == 2)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**GEMMA2_2B),
        LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=101,
                    num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False),
        GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=77, n_positions=16),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_parameters_are_those_of_the_model(tmp_path, config):
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    found = model_shape(str(tmp_path))
    assert found is not None
    positions = 16 * 48 if config.model_type == "gpt2" else 0  # a table that nothing multiplies
    # GPT-2's matrices are Conv1D, and they are two-dimensional as well.
    assert found[0].params == parameters(config) - positions
    if config.model_type == "gemma2":
        assert found[0] == PUBLISHED["google/gemma-2-2b"]


def test_what_is_no_dense_decoder_has_no_shape(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "num_local_experts": 4}))
    assert model_shape(str(tmp_path)) is None
    assert model_shape("nobody/has-this") is None


def test_operations_are_what_torch_counts(tmp_path):
    """Of a real forward pass; attention's own products are what the calculation leaves out."""
    recipe = save_recipe(tmp_path)
    tokens = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        make_model()(torch.arange(tokens)[None])
    pair = WhatIf(pairs=1, prompt_tokens=0, response_tokens=tokens / 2)
    # Held-out pairs are in both.
    one, two = (
        by_stage(estimated(recipe, tmp_path / "store", what_if=pair._replace(pairs=number)))
        for number in (1, 2)
    )
    per_pair = two["reference"].flops - one["reference"].flops
    encoder = 2 * tokens * 32 * 96
    assert 1 <= counter.get_total_flops() / (per_pair - encoder) < 1.25
    head = 2 * tokens * 32 * 400  # computed again in the backward pass
    assert one["train"].flops == pytest.approx(3 * (per_pair - encoder) + head + encoder)


def test_the_head_and_later_layers_cost_only_those_who_run_them(tmp_path, finished_run):
    """Features by themselves end at their layer; beside the reference they cost their encoder."""
    recipe = finished_run.recipe
    both = by_stage(estimated(recipe, tmp_path / "none"))
    assert both["features"].seconds is None
    assert both["features"].time_from == "reference"
    # The model as before, so the reference is there; other features are not.
    shallow = by_stage(estimated(recipe, finished_run.store, "features.tokens_k=4", "sae.layer=0"))
    deep = by_stage(estimated(recipe, finished_run.store, "features.tokens_k=4"))
    assert set(shallow) == {"features", "train", "evaluate"}
    block = 2 * 32 * 8 * (4 + 2) + 3 * 32 * 64
    tokens = deep["features"].tokens
    assert deep["features"].flops - shallow["features"].flops == pytest.approx(2 * block * tokens)
    store = open_store(finished_run.store)
    pairs = store.artifact("pairs", make_plan(load_recipe(str(recipe)), store).version("tokenize"))
    encoder = 2 * pairs.manifest["stats"]["answer_tokens"] * 32 * 96
    assert shallow["features"].flops == pytest.approx(2 * block * tokens + encoder)


def test_one_pass_serves_the_saes_that_are_missing(tmp_path, finished_run):
    """It ends at the deepest of them, and is told once."""
    also = [{"source": str(save_sae(tmp_path / "second", layer=2)), "layer": 2}]
    recipe = load_recipe(str(finished_run.recipe), {"features.tokens_k": 4, "sae.also": also})
    store = open_store(finished_run.store)
    both = by_stage(estimate_plan(recipe, make_plan(recipe, store), store, NOTHING))
    alone = by_stage(estimated(finished_run.recipe, finished_run.store, "features.tokens_k=4"))
    assert both["features@2"].time_from == "features"
    assert both["features@2"].seconds is None
    assert both["features@2"].bytes == both["features"].bytes == alone["features"].bytes
    block = 2 * 32 * 8 * (4 + 2) + 3 * 32 * 64
    pairs = store.artifact("pairs", make_plan(recipe, store).version("tokenize"))
    encoder = 2 * pairs.manifest["stats"]["answer_tokens"] * 32 * 96
    deeper = 2 * block * alone["features"].tokens
    assert both["features"].flops - alone["features"].flops == pytest.approx(deeper + encoder)


def test_tokens_and_rates_are_those_of_earlier_artifacts(finished_run):
    store = open_store(finished_run.store)
    plan = make_plan(load_recipe(str(finished_run.recipe)), store)
    pairs, policy = (
        store.artifact(plan.stages[stage].artifact, plan.stages[stage].version)
        for stage in ("tokenize", "train")
    )
    lengths = [
        sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        for row in pairs.table(shard=0).to_pylist()
    ]
    assert pairs.manifest["stats"]["tokens"] > sum(lengths)
    train = by_stage(estimated(finished_run.recipe, finished_run.store, "train.lr=1"))["train"]
    share = 12 / 18  # training pairs of all
    assert train.tokens == pytest.approx(share * pairs.manifest["stats"]["tokens"])
    rate = policy.manifest["stats"]["tokens_per_second"]
    assert train.time_from == f"policy/{policy.version}"
    assert train.seconds == pytest.approx(train.tokens / rate)
    dtype = ("train.lr=1", "model.attention=eager")  # nothing of it was made; the model's rate is
    assert by_stage(estimated(finished_run.recipe, finished_run.store, *dtype))["train"].seconds


def test_other_data_can_be_supposed(tmp_path, finished_run):
    """Then all stages are estimated, and grow with the pairs, whatever the store has."""
    few, many = (
        by_stage(estimated(finished_run.recipe, finished_run.store, what_if=WhatIf(number, 50, 80)))
        for number in (1000, 1_000_000)
    )
    assert set(few) == {"tokenize", "reference", "features", "train", "evaluate"}
    assert few["train"].tokens == 1000 * (50 + 2 * 80)
    assert many["train"].flops == pytest.approx(1000 * few["train"].flops)
    assert many["features"].bytes == pytest.approx(1000 * few["features"].bytes, rel=0.02)
    assert many["train"].bytes == few["train"].bytes  # a model is a model


def test_a_big_file_is_sampled(tmp_path):
    """Rows are counted, lengths are those of the first ones."""
    rows = 3 * SAMPLE_ROWS
    recipe = load_recipe(str(save_recipe(tmp_path)))
    save_pairs(tmp_path / "train.jsonl", rows)
    texts = pair_texts(recipe, "train")
    assert texts is not None
    assert texts.rows == rows
    answers = [json.loads(line) for line in (tmp_path / "train.jsonl").open()]
    size = sum(len(row["chosen"] + row["rejected"]) for row in answers)
    assert texts.answers == pytest.approx(size / rows / 4, rel=0.05)
    assert pair_texts(recipe.model_copy(update={
        "data": recipe.data.model_copy(update={"limit": 7})
    }), "train").rows == 7  # fmt: skip


def test_gemma2b_without_the_hub(fpo, tmp_path):
    """UltraFeedback's size, from what is published of it; ten million pairs in proportion."""
    shown = fpo("plan", "gemma2b", "--store", tmp_path)
    assert shown.code == 0
    assert "61,135 train pairs" in shown.out
    assert "H100-hours" in shown.out
    assert "about what an H200 did of it" in shown.out
    published, ten_million = (
        json.loads(fpo("plan", "gemma2b", "--store", tmp_path, "--json", *more).out)
        for more in ((), ("--pairs", "10000000"))
    )
    before, after = (
        {stage["stage"]: stage for stage in plan["estimates"]["stages"]}
        for plan in (published, ten_million)
    )
    assert before["tokenize"]["tokens"] == pytest.approx(63_135 * (185.1 + 2 * 305.3))
    ratio = 10_000_000 / 61_135
    for key in ("tokens", "flops", "seconds"):
        assert after["train"][key] / before["train"][key] == pytest.approx(ratio)
    # By the rule of thumb of 8 N T, 2.6 billion parameters, and attention's products left out.
    rule = 8 * 2.6e9 * before["train"]["tokens"]
    assert before["train"]["flops"] == pytest.approx(rule, rel=0.1)
    hours = sum(stage["seconds"] or 0 for stage in before.values()) / 3600
    assert published["estimates"]["h100_hours"] == pytest.approx(hours)
    assert before["train"]["seconds"] == pytest.approx(
        before["train"]["flops"] / H100_FLOPS / UTILIZATION
    )


def test_what_is_not_known_is_said(fpo, tmp_path):
    recipe = save_recipe(
        tmp_path, data={"train": ["some/pairs:train"], "heldout": ["some/pairs:test"]},
        model={"source": "some/model"}, sae={"source": "some-release:of/an/sae"},
    )  # fmt: skip
    shown = fpo("plan", recipe, "--store", tmp_path / "store")
    assert shown.code == 0
    assert "model some/model: its config.json is not here" in shown.out
    assert "train pairs: number and lengths are not known here; --pairs" in shown.out
    assert "its width is not known" in shown.out
    assert "H100" not in shown.out
    given = fpo("plan", recipe, "--store", tmp_path / "store", "--pairs", 100,
                "--prompt-tokens", 10, "--response-tokens", 20, "--json")  # fmt: skip
    stages = json.loads(given.out)["estimates"]["stages"]
    assert {s["stage"]: s["tokens"] for s in stages}["train"] == 100 * (10 + 2 * 20)


def test_a_wrong_number_is_refused(fpo, tmp_path):
    assert fpo("plan", "gemma2b", "--store", tmp_path, "--pairs", 0).code == 2
