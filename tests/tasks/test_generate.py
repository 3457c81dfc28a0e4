"""The ``answers`` artifact: what is in it, what a killed run keeps, and what is refused."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from pydantic import ValidationError

from fpo_core.data.render import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.recipe.generation import GenerationSettings
from fpo_core.recipe.schema import ModelSettings, ResourceSettings
from storage.location import open_store
from tasks.generate import endpoint_source, model_source, read_answers
from tests.tasks.answering import QUESTIONS, SETTINGS, VERSION, answer, source
from tests.tiny import make_tokenizer, save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An artifact that nothing disturbed."""
    return answer(tmp_path_factory.mktemp("whole"), source(folder))


def never_opened(folder):
    def refuse():
        raise AssertionError("the model is loaded for nothing")

    return source(folder)._replace(open=refuse)


def test_rows_are_in_the_questions_order_with_their_turns_and_prompts(whole):
    frame = whole.scan().collect()
    assert whole.num_shards() == 5
    expected = [
        (question.id, turn, temperature, sample)
        for question in QUESTIONS
        for temperature, sample in ((0.0, 0), (0.8, 0), (0.8, 1))
        for turn in range(len(question.turns))
    ]
    assert frame.select("question_id", "turn", "temperature", "sample").rows() == expected
    chat = ChatFormat(make_tokenizer(), "model")
    texts = {row[:4]: row[4] for row in frame.select(
        "question_id", "turn", "temperature", "sample", "text").iter_rows()}  # fmt: skip
    for row in frame.iter_rows(named=True):
        key = row["question_id"], row["turn"], row["temperature"], row["sample"]
        question = next(question for question in QUESTIONS if question.id == key[0])
        messages = [{"role": "user", "content": question.turns[0]}]
        if row["turn"]:
            said = texts[(key[0], 0, *key[2:])]
            messages.append({"role": "assistant", "content": said})
            messages.append({"role": "user", "content": question.turns[1]})
        (ids,) = chat.ids([chat.prompt_text(tuple(messages))])
        assert row["prompt_ids"] == ids
        assert row["tokens"] == len(row["answer_ids"])
        decoded = chat.tokenizer.decode(row["answer_ids"], skip_special_tokens=True)
        assert row["text"] == decoded.strip()
    stats = whole.manifest["stats"]
    assert stats["answers"] == len(frame) == 39
    assert stats["tokens"] == frame["tokens"].sum()
    assert stats["cut_share"] == pytest.approx(frame["stop"].eq("length").mean())


def test_answers_do_not_depend_on_the_shards(whole, folder, tmp_path):
    other = answer(tmp_path, source(folder), SETTINGS.model_copy(update={"shard_questions": 4}))
    assert other.num_shards() == 3
    assert other.scan().collect().equals(whole.scan().collect())


def test_answers_are_read_by_temperature_with_a_questions_turns_together(whole):
    found = read_answers(whole, "policy", 0.8, 1)
    assert found.model == "policy"
    assert {name: len(turns) for name, turns in found.turns.items()} == {
        question.id: len(question.turns) for question in QUESTIONS
    }
    texts = {
        row["turn"]: row["text"]
        for row in whole.scan().collect().iter_rows(named=True)
        if (row["question_id"], row["temperature"], row["sample"]) == ("q1", 0.8, 1)
    }
    assert found.turns["q1"] == (texts[0], texts[1])
    # Greedy answers are all the same: the one there is stands for every sample.
    assert read_answers(whole, "policy", 0.0, 1) == read_answers(whole, "policy", 0.0)
    with pytest.raises(FPOError, match=r"at temperature 0\.7, sample 0.*\(0, 0\), \(0\.8, 0\), \("):
        read_answers(whole, "policy", 0.7)
    with pytest.raises(FPOError, match="sample 2"):
        read_answers(whole, "policy", 0.8, 2)


def test_questions_with_a_temperature_of_their_own_are_answered_at_it(whole, folder, tmp_path):
    own = {question.id: (0.0, 0.8)[place % 2] for place, question in enumerate(QUESTIONS)}
    artifact = answer(tmp_path / "store", source(folder), own=own)
    rows = artifact.scan().collect()
    assert dict(rows.select("question_id", "temperature").unique().iter_rows()) == own
    assert rows.group_by("question_id").agg(pl.col("sample").n_unique()).sort("question_id")[
        "sample"
    ].to_list() == [1, 2, 1, 2, 1, 2, 1, 2, 1]
    for sample in (0, 1):
        found = read_answers(artifact, "policy", None, sample)
        for name, temperature in own.items():
            # The same answers as at a temperature for all.
            assert found.turns[name] == read_answers(whole, "", temperature, sample).turns[name]


def test_the_model_is_loaded_for_missing_shards_alone(whole, folder, tmp_path):
    store = open_store(tmp_path)
    with store.hold("answers", VERSION, None) as hold:
        writer = store.writer("answers", VERSION, hold)
        for shard in range(whole.num_shards()):
            writer.put_shard(shard, {"": whole.table(shard=shard)})
    again = answer(tmp_path, never_opened(folder))
    assert again.manifest["stats"]["tokens"] == whole.manifest["stats"]["tokens"]


def test_prompts_are_checked_before_the_model_is_loaded(folder, tmp_path):
    with pytest.raises(FPOError, match=r"max_new_tokens=600 fill the model's context of 512.*'q1'"):
        answer(tmp_path, never_opened(folder), SETTINGS.model_copy(update={"max_new_tokens": 600}))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(whole, folder, tmp_path):
    command = [sys.executable, "-m", "tests.tasks.answering", str(tmp_path), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ)
    first = tmp_path / "artifacts" / "answers" / VERSION / "parts" / "00000.json"
    deadline = time.monotonic() + 180
    while not first.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    store = open_store(tmp_path)
    assert store.state("answers", VERSION) != "complete"
    with store.hold("answers", VERSION, None) as hold:
        kept = store.writer("answers", VERSION, hold).finished_shards()
    assert 0 in kept
    assert len(kept) < whole.num_shards()
    written = {shard: (first.parent / f"{shard:05d}.json").stat().st_mtime_ns for shard in kept}
    finished = answer(tmp_path, source(folder))
    assert finished.manifest["files"] == whole.manifest["files"]
    for name in whole.manifest["files"]:
        assert finished.path(name).read_bytes() == whole.path(name).read_bytes()
    for shard, time_ in written.items():
        assert (first.parent / f"{shard:05d}.json").stat().st_mtime_ns == time_


def test_the_share_that_is_cut_off_is_said(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        answer(tmp_path, source(folder), SETTINGS.model_copy(update={"max_new_tokens": 2}))
    assert "answers, " in caplog.text
    assert "% of them cut off at max_new_tokens" in caplog.text


REFUSED = {
    "no endpoint": ({"backend": "openai"}, "needs base_url and model"),
    "an endpoint for a model here": ({"model": "m"}, "model: for backend=openai alone"),
    "no scheme": ({"backend": "openai", "base_url": "host:1/v1", "model": "m"}, "with http://"),
    "credentials": (
        {"backend": "openai", "base_url": "http://me:secret@host/v1", "model": "m"}, "credentials",
    ),
    "a key for a name": ({"backend": "openai", "key_env": "sk-1234"}, "key_env"),
    "twice": ({"temperatures": (0.5, 0.7, 0.5)}, r"named twice: 0\.5"),
    "none": ({"temperatures": ()}, "at least 1"),
    "top_p": ({"top_p": 0}, "greater than 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_make_no_sense_are_refused(case):
    values, message = REFUSED[case]
    with pytest.raises(ValidationError, match=message):
        GenerationSettings(**values)


def test_what_an_answer_needs_is_asked_for_at_once(folder, monkeypatch):
    resources, model = ResourceSettings(), ModelSettings(source=str(folder))
    with pytest.raises(FPOError, match="pip install vllm"):
        model_source(folder, "model", GenerationSettings(backend="vllm"), model, resources)
    monkeypatch.delenv("TINY_KEY", raising=False)
    settings = GenerationSettings(
        backend="openai", base_url="http://127.0.0.1:9/v1", model="m", key_env="TINY_KEY"
    )
    with pytest.raises(FPOError, match="environment variable TINY_KEY"):
        endpoint_source(settings, resources)
