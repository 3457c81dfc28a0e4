"""The recipe gemma2-tiny from the command that makes its model on: gemma2b's way, two ranks, ZeRO.

What the stages stored is compared with transformers' own forward pass and with numpy.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.main import main
from fpo_core.models import random_gemma
from fpo_core.models.budget import TokenBudget
from fpo_core.models.load import load_model
from fpo_core.offline import WantedFeatures, score_shard
from fpo_core.recipe import load_recipe
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import load_coder
from fpo_core.training.start_gate import discrepancy_tolerance
from storage.artifact import Artifact
from storage.catalog import list_artifacts
from storage.location import open_store
from storage.schemas import FEATURES_POOLED
from tasks.arrow import to_table
from tasks.offline import read_pair_ids

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FEW = (
    "--set", "data.limit=32", "--set", "train.batch_size=8", "--set", "sft.limit=64",
    "--set", "evaluation.prompts=2",
    "--set", "evaluation.max_new_tokens=8", "--set", "resources.tokens_per_batch=512",
)  # fmt: skip


class Made(NamedTuple):
    """A folder where the commands ran as the README has them."""

    folder: Path
    artifacts: dict[str, Artifact]


def artifacts(folder: Path) -> dict[str, Artifact]:
    """The newest artifact of each kind."""
    store = open_store(folder / "fpo-store")
    found = {}
    for info in sorted(list_artifacts(store), key=lambda info: info.created or ""):
        assert info.state == "complete", info
        found[info.stage] = store.artifact(info.stage, info.version)
    return found


@pytest.fixture(scope="module")
def made(prefect_server, tmp_path_factory) -> Iterator[Made]:
    """Made by the command, run with the recipe's two ranks and ZeRO-2, in a folder of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (["make-tiny-gemma"], ["run", "gemma2-tiny", *FEW]):
            with pytest.raises(SystemExit) as left:
                main(command)
            assert not left.value.code
        yield Made(folder, artifacts(folder))


def test_it_takes_gemma2bs_settings():
    """But for the places of its files, and its size, it is that recipe."""
    tiny, full = load_recipe("gemma2-tiny").train, load_recipe("gemma2b").train
    assert tiny.model_dump(exclude={"lr", "warmup_steps"}) == full.model_dump(
        exclude={"lr", "warmup_steps"}
    )
    assert (tiny.zero_stage, tiny.activation_checkpointing) == (2, True)
    recipe = load_recipe("gemma2-tiny")
    assert (recipe.model.dtype, recipe.model.attention) == ("bfloat16", "eager")
    assert (recipe.data.template, recipe.resources.ranks) == ("halos", 2)


def test_training_starts_at_log_2_and_learns(made):
    assert set(made.artifacts) == {
        "instructions", "sft", "pairs", "reference", "features", "policy", "evaluation",
    }  # fmt: skip
    steps = pl.read_parquet(made.artifacts["policy"].path("metrics.parquet"))
    # The caches are of a bfloat16 pass, the policy is float32.
    assert steps["loss"][0] == pytest.approx(np.log(2), abs=1e-3)
    assert steps["discrepancy_chosen"][0] < 0.3 * steps["discrepancy_chosen"][-1]
    assert steps["loss"][-1] < np.log(2) - 1e-3
    assert steps["pairs"].to_list() == [8, 8, 8, 8]
    assert list((made.folder / "fpo-store" / "runs").glob("*/train-rank1.log"))


def test_the_policy_is_a_gemma_2_that_transformers_opens(made):
    folder = made.artifacts["policy"].folder("model")
    policy = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(made.artifacts["sft"].folder("model"))
    assert policy.config.model_type == "gemma2"
    assert policy.config.final_logit_softcapping == 3.0
    assert policy.config.layer_types[:2] == ["sliding_attention", "full_attention"]
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    moved = [
        (name, float((new - old).detach().abs().max()))
        for (name, new), old in zip(policy.named_parameters(), start.parameters(), strict=True)
    ]
    # Four of Adam's steps, each of the rate at most and little more.
    assert all(0 < most < 5 * load_recipe("gemma2-tiny").train.lr for _, most in moved), moved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("How?")["input_ids"][0] == tokenizer.bos_token_id == policy.config.bos_token_id
    assert tokenizer.chat_template is None
    assert tokenizer.decode(tokenizer("Ünlike\n 漢?")["input_ids"][1:]) == "Ünlike\n 漢?"


def test_the_reference_and_its_features_are_what_a_plain_forward_pass_says(made):
    """One response after the other, without our masks; the SAE as the paper writes it."""
    model = AutoModelForCausalLM.from_pretrained(
        made.artifacts["sft"].folder("model"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    with np.load(made.folder / "gemma2-tiny" / random_gemma.SAE_PLACE / "params.npz") as sae:
        params = dict(sae)
    logps = table(made.artifacts["reference"].scan())
    pooled = table(made.artifacts["features"].scan("pooled").filter(pl.col("side") == "chosen"))
    pairs = made.artifacts["pairs"].scan().collect().to_dicts()[:12]
    assert max(len(p["prompt_ids"] + p["chosen_ids"]) for p in pairs) > model.config.sliding_window
    for pair in pairs:
        prompt, answer = pair["prompt_ids"], pair["chosen_ids"]
        with torch.no_grad():
            out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        scored = slice(len(prompt) - 1, -1)
        said = out.logits[0, scored].float().log_softmax(-1)
        mine = float(said.gather(1, torch.tensor(answer)[:, None]).sum())
        stored = logps[pair["pair_id"]]["chosen_logp"]
        assert abs(mine - stored) / len(answer) < 0.01
        resid = out.hidden_states[random_gemma.SAE_LAYER + 1][0, scored].float().numpy()
        acts = np.maximum(resid @ params["W_enc"] + params["b_enc"], 0)
        acts *= acts > params["threshold"]
        assert 8 < (acts > 0).sum(1).mean() < 40
        row, mean = pooled[pair["pair_id"]], acts.mean(0)
        near = mean[row["indices"][:20]]
        assert np.abs(near - row["values"][:20]).mean() < 0.1 * near.mean()


def table(frame: pl.LazyFrame) -> dict[str, dict]:
    return {row["pair_id"]: row for row in frame.collect().to_dicts()}


def test_the_features_l0_is_what_the_saes_folder_says(made):
    tokens = made.artifacts["features"].scan("tokens").select("nonzero").collect()
    assert tokens["nonzero"].mean() == pytest.approx(random_gemma.L0, rel=0.3)


def fvu(params, activations) -> float:
    """Of an SAE of Gemma Scope's format, as the paper writes it."""
    acts = np.maximum(activations @ params["W_enc"] + params["b_enc"], 0)
    acts *= activations @ params["W_enc"] + params["b_enc"] > params["threshold"]
    unexplained = ((activations - acts @ params["W_dec"] - params["b_dec"]) ** 2).sum()
    return unexplained / ((activations - activations.mean(0)) ** 2).sum()


def test_both_saes_explain_the_model_and_pass_the_gate(made, fpo):
    """Without any switch; the MLP's through its own features stage."""
    source = f"./gemma2-tiny/{random_gemma.MLP_SAE_PLACE}"
    also = f"sae.also=[{{source: {source}, layer: {random_gemma.SAE_LAYER}, site: mlp_out}}]"
    stage = f"features@{random_gemma.SAE_LAYER}-mlp_out"
    result = fpo("run", "gemma2-tiny", *FEW, "--set", also, "--only", stage)
    assert result.code == 0, result.err
    store = open_store(made.folder / "fpo-store")
    gates = {
        gate["place"]: gate
        for info in list_artifacts(store)
        if info.stage == "features"
        for gate in [store.artifact("features", info.version).manifest["stats"]["gate"]]
    }
    model = AutoModelForCausalLM.from_pretrained(
        made.artifacts["sft"].folder("model"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    seen: dict[str, list] = {}
    block = model.model.layers[random_gemma.SAE_LAYER]
    modules = {"resid_post": block, "mlp_out": block.post_feedforward_layernorm}
    for site, module in modules.items():
        values = seen.setdefault(site, [])
        module.register_forward_hook(lambda _m, _i, out, values=values: values.append(out[0, 1:]))
    pairs = made.artifacts["pairs"].scan().collect().to_dicts()
    for pair in pairs[: gates["layer 2 mlp_out"]["tokens"] // 60]:
        with torch.no_grad():
            model(torch.tensor([pair["prompt_ids"] + pair["chosen_ids"]]))
    for place, hookpoint in random_gemma.SAE_HOOKS.items():
        with np.load(made.folder / "gemma2-tiny" / place / "params.npz") as sae:
            mine = fvu(dict(sae), torch.cat(seen[hookpoint.site]).float().numpy())
        gate = gates[str(hookpoint)]
        assert gate["fvu"] == pytest.approx(mine, rel=0.15), place
        assert gate["fvu"] < 0.4
        assert gate["fits"]
        assert gate["declared"]["l0"] == random_gemma.L0
        assert gate["l0"] == pytest.approx(random_gemma.L0, rel=0.2)
    trained = fpo("run", "gemma2-tiny", *FEW, "--set", also, "--only", "train")
    assert trained.code == 0, trained.err
    assert "FVU" in trained.err


def discrepancies(ours: pl.DataFrame, theirs: pl.DataFrame, k: int = 50) -> np.ndarray:
    """Each response's D by Eq. 10, relative to the mean square of our top features."""
    found = []
    for (mine, size), (others, other_size) in zip(
        *(table.select("indices", "values").iter_rows() for table in (ours, theirs)), strict=True
    ):
        one, other = np.zeros(random_gemma.D_SAE), np.zeros(random_gemma.D_SAE)
        one[mine], other[others] = size, other_size
        both = [*{*mine[:k], *others[:k]}]
        found.append(np.square(one - other)[both].sum() / np.square(size[:k]).sum())
    return np.array(found)


def test_bfloat16_starts_training_at_either_site_and_another_model_does_not(made):
    """The start gate's bounds: an MLP's features are rounded beyond what the stream's are."""
    settings = FeatureSettings(cache_k="all", tokens_share=0.0)
    saes = [
        WantedFeatures(load_coder(made.folder / "gemma2-tiny" / place), hookpoint, settings)
        for place, hookpoint in random_gemma.SAE_HOOKS.items()
    ]
    artifact = made.artifacts["pairs"]
    shards = (artifact.table(shard=shard) for shard in range(artifact.num_shards()))
    pairs = [pair for table in shards for pair in read_pair_ids(table)]

    def pooled(model: Any) -> list[pl.DataFrame]:
        budget = TokenBudget(2048, given=False)
        scores = score_shard(model, pairs, saes, want_reference=False, budget=budget)
        tables = (to_table(found.pooled, FEATURES_POOLED) for found in scores.features)
        return [pl.DataFrame(pl.from_arrow(table)) for table in tables]

    folder = made.artifacts["sft"].folder("model")
    exact, rounded = (
        pooled(load_model(folder, dtype=dtype, attention="eager"))
        for dtype in ("float32", "bfloat16")
    )
    other = random_gemma.random_model(random_gemma.TOKENS, seed=1)
    other.set_attn_implementation("eager")
    other = pooled(other)
    shares = {}
    for number, sae in enumerate(saes):
        site = sae.hookpoint.site
        lengths = torch.tensor(exact[number]["n_tokens"].to_list())
        bounds = discrepancy_tolerance("bfloat16", site, lengths).numpy()
        rounding = discrepancies(rounded[number], exact[number])
        assert (rounding < bounds).all()
        assert (discrepancies(other[number], exact[number]) > 5 * bounds).all()
        stream = discrepancy_tolerance("bfloat16", "resid_post", lengths).numpy()
        shares[site] = (rounding / stream).max()
    assert shares["mlp_out"] > shares["resid_post"]


def test_the_evaluation_has_its_metrics_and_answers(made):
    evaluation = made.artifacts["evaluation"]
    metrics = {m["key"]: m for m in json.loads(evaluation.path("metrics.json").read_text())}
    assert 0 < metrics["kl_chosen"]["policy"]["value"] < 50
    answers = pl.read_parquet(evaluation.path("answers.parquet"))
    assert answers["before"].str.len_chars().min() > 0
    assert "assistant" not in answers["prompt"][0]
    assert (made.folder / "reports" / "gemma2-tiny-fpo" / "report.html").is_file()


def test_zero_3_trains_the_same_policy_from_the_same_caches(made, fpo):
    """The tied head is gathered where it is used without its module."""
    result = fpo(
        "run", "gemma2-tiny", *FEW, "--set", "resources.ranks=2", "--set", "train.zero_stage=3"
    )
    assert result.code == 0, result.err
    assert result.err.count("reused") == 5
    policies = [
        AutoModelForCausalLM.from_pretrained(found["policy"].folder("model"))
        for found in (made.artifacts, artifacts(made.folder))
    ]
    for one, other in zip(*(policy.parameters() for policy in policies), strict=True):
        # Adam divides by the gradient's size: where that is rounding, so is its step.
        assert float((one - other).detach().abs().mean()) < 1e-5


def test_a_large_vocabulary_and_another_seed(tmp_path, fpo):
    """In files alone: Gemma-2's own 256,000 tokens, and the same files from the same seed."""
    for name, *options in (
        ("a",), ("b",), ("large", "--vocabulary", 256_000), ("seed", "--seed", 1),
    ):  # fmt: skip
        assert fpo("make-tiny-gemma", tmp_path / name, *options).code == 0
    weights = "model/model.safetensors"
    saes = [f"{place}/params.npz" for place in random_gemma.SAE_HOOKS]
    first = tmp_path / "a"
    for file in sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file()):
        assert (first / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for file in (weights, *saes):
        assert (first / file).read_bytes() != (tmp_path / "seed" / file).read_bytes()
    assert json.loads((tmp_path / "large/model/config.json").read_text())["vocab_size"] == 256_000
    assert (tmp_path / "large" / weights).stat().st_size > 256_000 * 64 * 4


def test_what_is_missing_or_in_the_way_is_said(tmp_path, monkeypatch, fpo):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for command in ("run", "plan"):
        result = fpo(command, "gemma2-tiny", "--store", tmp_path / "store")
        assert result.code == 1
        assert "`fpo make-tiny-gemma` makes the folder gemma2-tiny" in result.err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").write_text("")
    refused = fpo("make-tiny-gemma", "mine")
    assert refused.code == 1
    assert "mine is there already; remove it" in refused.err
    small = fpo("make-tiny-gemma", "small", "--vocabulary", 1000)
    assert "--vocabulary 1000: the tokenizer has 2048 tokens" in small.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "recipes", "store"]
