"""Answers to benchmark questions -> the ``answers`` artifact, shard by shard.

A shard is some questions with all their turns, temperatures and samples. Shards do not depend on
each other, and an answer depends on its own seed alone, so that a killed run goes on where it was
with the answers that it would have had.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import polars as pl
import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.bench.model import Answers, Question
from fpo_core.data.render import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.generation.answers import END_OF_TURN, LENGTH, Backend, Generated, Sampling
from fpo_core.generation.prompts import (
    Wanted,
    answer_questions,
    check_prompts,
    check_questions,
)
from fpo_core.models.load import inference_device, load_model, load_tokenizer, prepare_cpu
from fpo_core.progress import Progress
from fpo_core.recipe.benchmarks import REFERENCE
from fpo_core.recipe.generation import GenerationSettings
from fpo_core.recipe.schema import ModelSettings, ResourceSettings
from storage.artifact import Artifact
from storage.schemas import ANSWERS
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.bench_plan import POLICY, planned_benchmarks
from tasks.run import Outcome, PipelineRun, Work
from tasks.transfer import local_folder

if TYPE_CHECKING:
    from fpo_core.generation.answers import Prompt

log = logging.getLogger("fpo.stage")


@task(name="generate", task_run_name="{stage}", cache_policy=NO_CACHE)
def generate(run: PipelineRun, stage: str) -> Outcome:
    """Answer a benchmark's questions with the policy, or with whom it is compared."""
    planned, model = next(
        (benchmark, model)
        for benchmark in planned_benchmarks(run.recipe)
        for model in benchmark.models
        if benchmark.answers_stage(model) == stage
    )

    def compute(writer: ArtifactWriter) -> Work:
        return write_answers(
            writer, planned.questions, run.recipe.generation, _source(run, model), planned.own
        )

    return announce(run.bring_about(stage, compute))


def _source(run: PipelineRun, model: str) -> "AnswerSource":
    recipe = run.recipe
    if recipe.generation.backend == "openai":
        return endpoint_source(recipe.generation, recipe.resources)
    if model == POLICY:
        folder = local_folder(run.artifact("train"), "model")
    elif model == REFERENCE:
        folder = run.reference_folder()
    else:
        folder = local_folder(run.store.artifact(*model.split("/")), "model")
    return model_source(
        folder,
        recipe.data.template,
        recipe.generation,
        recipe.model,
        recipe.resources,
        run.plan.date and run.plan.date.date,
    )


class AnswerSource(NamedTuple):
    """What answers; a model is loaded only when a shard is missing."""

    chat: ChatFormat | None  # None: an endpoint has its own
    context: int | None  # tokens that the model can take; None: an endpoint knows
    open: Callable[[], Backend]


def model_source(
    folder: Path,
    template: str,
    settings: GenerationSettings,
    model: ModelSettings,
    resources: ResourceSettings,
    date: str | None = None,
) -> AnswerSource:
    """A model folder, by transformers or vLLM.

    Args:
        folder: a Hugging Face model folder, such as a policy's.
        template: chat template, as of ``data.template``.
        settings: how it answers.
        model: its dtype and attention.
        resources: threads and the budget of tokens.
        date: for a template that writes one.

    Raises:
        FPOError: a tokenizer or chat template that does not serve, or vLLM is not installed.
    """
    from transformers import AutoConfig

    from fpo_core.generation.vllm_backend import VllmBackend, check_vllm

    if settings.backend == "vllm":
        check_vllm()
    tokenizer = load_tokenizer(folder)
    chat = ChatFormat(tokenizer, template, date)
    sampling = Sampling(settings.max_new_tokens, settings.top_p, chat.end_tokens())

    def by_transformers() -> Backend:
        from fpo_core.generation.transformers_backend import TransformersBackend, answer_budget

        prepare_cpu(resources.threads)
        loaded = load_model(
            folder, dtype=model.dtype, attention=model.attention, device=inference_device()
        )
        budget = answer_budget(loaded, resources.generation_tokens)
        return TransformersBackend(loaded, tokenizer, sampling, budget)

    def by_vllm() -> Backend:
        return VllmBackend(folder, model.dtype, tokenizer, sampling)

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config = config.get_text_config()
    return AnswerSource(
        chat, config.max_position_embeddings,
        by_vllm if settings.backend == "vllm" else by_transformers,
    )  # fmt: skip


def endpoint_source(settings: GenerationSettings, resources: ResourceSettings) -> AnswerSource:
    """The endpoint that the settings name.

    Raises:
        FPOError: the openai package or the key is missing.
    """
    from fpo_core.generation.endpoint import EndpointBackend

    assert settings.base_url is not None
    assert settings.model is not None
    backend = EndpointBackend(
        settings.base_url, settings.model, settings.key_env,
        Sampling(settings.max_new_tokens, settings.top_p), resources.generation_requests,
    )  # fmt: skip
    return AnswerSource(None, None, lambda: backend)


def write_answers(
    writer: ArtifactWriter,
    questions: Sequence[Question],
    settings: GenerationSettings,
    source: AnswerSource,
    own: Mapping[str, float] | None = None,
) -> Work:
    """Answer the questions of the shards that are missing, and write them.

    Args:
        writer: of the ``answers`` artifact.
        questions: the benchmark's, or the first of them.
        settings: which answers, and how they are sampled.
        source: what answers.
        own: the benchmark's own temperature of each question, in place of the settings'.

    Raises:
        FPOError: questions or prompts that cannot be answered.
    """
    check_questions(questions)
    if source.chat is not None:
        assert source.context is not None
        check_prompts(questions, source.chat, settings.max_new_tokens, source.context)
    wanted = Wanted(settings.temperatures, settings.samples, settings.seed, own)
    size = settings.shard_questions
    shards = [questions[start : start + size] for start in range(0, len(questions), size)]
    finished = writer.finished_shards()
    missing = [number for number in range(len(shards)) if number not in finished]
    tokens = 0
    if missing:
        backend = source.open()
        total = _answers_of(questions, wanted)
        done = total - sum(_answers_of(shards[number], wanted) for number in missing)
        with Progress("answers", total=total, unit="answer", done=done) as progress:
            for number in missing:
                rows = []
                for answer in answer_questions(backend, shards[number], wanted, source.chat):
                    rows.append(answer)
                    tokens += answer.tokens
                    progress.advance(1)
                writer.put_shard(number, {"": _table(rows, shards[number], wanted)})
    return Work(_stats(writer), tokens)


def _answers_of(questions: Sequence[Question], wanted: Wanted) -> int:
    return sum(len(one.turns) * len(list(wanted.each(one.id))) for one in questions)


def _table(
    answers: Sequence[Generated], questions: Sequence[Question], wanted: Wanted
) -> pa.Table:  # fmt: skip
    """A shard's rows in the questions' order, whatever order they were answered in."""
    place = {question.id: number for number, question in enumerate(questions)}
    order = {
        (question.id, *one): number
        for question in questions
        for number, one in enumerate(wanted.each(question.id))
    }

    def key(prompt: "Prompt") -> tuple[int, int, int]:
        name = prompt.question_id
        return place[name], order[name, prompt.temperature, prompt.sample], prompt.turn

    rows = [_row(answer) for answer in sorted(answers, key=lambda answer: key(answer.prompt))]
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _row(answer: Generated) -> dict[str, object]:
    prompt = answer.prompt
    return {
        "question_id": prompt.question_id,
        "turn": prompt.turn,
        "temperature": prompt.temperature,
        "sample": prompt.sample,
        "prompt_ids": prompt.ids,
        "answer_ids": answer.answer_ids,
        "text": answer.text,
        "stop": answer.stop,
        "tokens": answer.tokens,
        "seed": prompt.seed,
    }


def _stats(writer: ArtifactWriter) -> dict[str, object]:
    """Over all shards, those of earlier attempts too."""
    tables = [
        writer.read_table("", receipt, ["text", "tokens", "stop"])
        for _, receipt in sorted(writer.finished_shards().items())
    ]
    frame = pl.DataFrame(pa.concat_tables(tables))
    cut = int(frame["stop"].eq(LENGTH).sum()) / len(frame)
    neither = frame.filter(~pl.col("stop").is_in([LENGTH, END_OF_TURN]))["stop"]
    if len(neither):
        log.warning("%d answers ended for another reason: %s", len(neither),
                    ", ".join(sorted(set(neither))))  # fmt: skip
    log.info("%d answers, %.1f %% of them cut off at max_new_tokens", len(frame), 100 * cut)
    return {
        "answers": len(frame), "tokens": int(frame["tokens"].sum()), "cut_share": cut,
        "empty": int(frame["text"].eq("").sum()),
    }  # fmt: skip


def read_answers(
    artifact: Artifact, model: str, temperature: float | None, sample: int = 0
) -> Answers:
    """The answers of one temperature and sample, a question's turns together.

    Args:
        artifact: of ``write_answers``.
        model: name to show them under.
        temperature: one of the artifact's; None: each question has its own.
        sample: number of the sample.

    Raises:
        FPOError: it holds no such answers, naming those it holds.
    """
    columns = ["question_id", "turn", "temperature", "sample", "text"]
    frame = artifact.scan().select(columns).collect()
    wanted = pl.col("temperature") if temperature is None else pl.lit(temperature, pl.Float64)
    chosen = frame.filter(
        pl.col("temperature") == wanted,
        pl.col("sample") == pl.when(wanted > 0).then(sample).otherwise(0),
    )
    if chosen.is_empty():
        told = "of each question's own" if temperature is None else f"{temperature:g}"
        held = frame.select("temperature", "sample").unique().sort("temperature", "sample")
        raise FPOError(
            f"{artifact.name} holds no answers at temperature {told}, sample {sample}; it "
            f"holds (temperature, sample) {', '.join(f'({t:g}, {s})' for t, s in held.iter_rows())}"
        )
    turns: defaultdict[str, list[str]] = defaultdict(list)
    for name, text in chosen.sort("turn", maintain_order=True).select(
        "question_id", "text"
    ).iter_rows():  # fmt: skip
        turns[name].append(text)
    return Answers(model, {name: tuple(texts) for name, texts in turns.items()})
