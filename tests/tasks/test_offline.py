"""The pass behind ``reference`` and ``features`` on real models and a real store."""

from pathlib import Path
from threading import Event

import pytest
import torch

from fpo_core.errors import FPOError
from storage.writer import ArtifactWriter
from tasks.fanout import Todo
from tasks.offline import OfflineJob, OfflineWorker, score_shards
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


def test_a_shard_is_finished_while_the_next_is_computed(tokenized, monkeypatch):
    """And stays so whatever becomes of that."""
    run, compute = tokenized(), OfflineWorker.compute

    def waits(worker, todo, on_tokens):
        if todo.shard == 1:
            computing.set()
            assert finished.wait(30)
            raise RuntimeError("no more")
        return compute(worker, todo, on_tokens)

    monkeypatch.setattr(OfflineWorker, "compute", waits)
    computing, finished = Event(), Event()
    put_receipt = ArtifactWriter.put_receipt

    def put(writer, receipt):
        assert computing.wait(30)  # shard 1 has begun
        put_receipt(writer, receipt)
        finished.set()

    monkeypatch.setattr(ArtifactWriter, "put_receipt", put)
    with run.writers_beside(["reference"]) as writers:
        with pytest.raises(RuntimeError, match="no more"):
            score_shards(run, writers)
        assert list(writers["reference"].finished_shards()) == [0]


def test_what_was_being_written_is_finished_when_the_next_shard_fails(tokenized, monkeypatch):
    run, compute = tokenized(), OfflineWorker.compute
    failed, put_tables = Event(), ArtifactWriter.put_tables

    def fails(worker, todo, on_tokens):
        if todo.shard == 2:
            failed.set()
            raise FPOError("no more")
        return compute(worker, todo, on_tokens)

    def put(writer, index, tables):
        assert index == 0 or failed.wait(30)
        return put_tables(writer, index, tables)

    monkeypatch.setattr(OfflineWorker, "compute", fails)
    monkeypatch.setattr(ArtifactWriter, "put_tables", put)
    with run.writers_beside(["reference"]) as writers:
        with pytest.raises(FPOError, match="no more"):
            score_shards(run, writers)
        assert list(writers["reference"].finished_shards()) == [0, 1]


def test_workers_of_other_processes_hold_no_decoder(tokenized):
    """The gate, which reads it, ran before they began."""
    run = tokenized()
    with run.writers_beside(BOTH) as writers:
        here = OfflineWorker(run, writers)
        assert here._saes["features"].coder.W_dec is not None
        here.gate()
        there = OfflineJob.of(run, BOTH).worker()
        for worker in (here, there):
            assert worker._saes["features"].coder.W_dec is None
        assert there.run(Todo(1, BOTH)) == here.run(Todo(1, BOTH))
