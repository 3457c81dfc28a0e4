"""The pass behind ``reference`` and ``features`` on real models and a real store."""

from pathlib import Path

import pytest
import torch

from fpo_core.errors import FPOError
from tasks.offline import score_shards
from tasks.run import PipelineRun, prepare_run
from tasks.tokenize import tokenize
from tests.fpo_core.test_architectures import VISION
from tests.tiny import make_model, save_model, save_pairs, save_recipe

BOTH = ("reference", "features")
SHARDS = 4


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe with a model of its own; its pairs fill four shards."""
    folder = tmp_path_factory.mktemp("offline")
    path = save_recipe(folder)
    save_pairs(folder / "train.jsonl", 12)
    return path


@pytest.fixture
def tokenized(recipe, tmp_path):
    """Gives a run of some overrides on a store that has the pairs."""

    def prepare(*overrides: str) -> PipelineRun:
        run = prepare_run(str(recipe), overrides, str(tmp_path / "store"), only="tokenize")[0]
        tokenize.fn(run)
        return run

    return prepare


def save_multimodal(folder: Path) -> Path:
    """A tiny model of Gemma-3's multimodal class, with the tokenizer of the others."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = make_model("gemma2").config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
             "num_attention_heads", "num_key_value_heads", "sliding_window")  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={name: text[name] for name in names}, vision_config=VISION,
        mm_tokens_per_image=4, image_token_index=399, boi_token_index=398, eoi_token_index=397,
    )  # fmt: skip
    save_model(folder)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_multimodal_class_is_read_like_its_text_model(tokenized, tmp_path):
    run = tokenized(f"model.source={save_multimodal(tmp_path / 'gemma3')}")
    with run.writers_beside(BOTH) as writers:
        score_shards(run, writers)
        for stage in BOTH:
            assert len(writers[stage].finished_shards()) == SHARDS


@pytest.mark.parametrize("stage", BOTH)
def test_pairs_of_another_tokenizer_are_refused(tokenized, tmp_path, stage):
    """By the pass, and by the gate before it."""
    model = save_model(tmp_path / "model")
    run = tokenized(f"model.source={model}")
    save_model(model, vocab_size=200)  # its tokenizer is the same
    with (
        run.writers_beside([stage]) as writers,
        pytest.raises(FPOError, match=r"the token id \d+, the model's vocabulary has 200"),
    ):
        score_shards(run, writers)
