"""Generated answers against transformers' own, softmax's probabilities and plain templates."""

import hashlib
import logging
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import TopPLogitsWarper

from fpo_core.bench.model import Question
from fpo_core.data.render import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.generation.answers import Prompt, Sampling, prompt_seed
from fpo_core.generation.prompts import (
    Wanted,
    answer_questions,
    check_prompts,
    check_questions,
)
from fpo_core.generation.sampler import TokenSampler
from fpo_core.generation.transformers_backend import (
    TransformersBackend,
    answer_budget,
    cached_bytes,
)
from fpo_core.generation.vllm_backend import check_vllm
from fpo_core.models.budget import TokenBudget
from tests.tiny import make_model, make_tokenizer

ROWS = [[5, 6, 7], [9], list(range(11, 24)), [30, 31], [8] * 6, [44, 45, 46, 47]]


def prompts_of(rows, temperature=0.0, seed=0):
    return [
        Prompt(f"q{n}", 0, temperature, 0, prompt_seed(seed, f"q{n}", 0, temperature, 0), (), ids)
        for n, ids in enumerate(rows)
    ]


def answers_of(model, prompts, sampling, budget=10_000):
    backend = TransformersBackend(model, make_tokenizer(), sampling, TokenBudget(budget))
    return {answer.prompt: answer for answer in map(hashable, backend.generate(prompts))}


def hashable(answer):
    return answer._replace(prompt=answer.prompt.question_id)


def alone(model, ids, sampling) -> list[int]:
    """transformers' own greedy answer to one prompt without padding."""
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=sampling.max_new_tokens, do_sample=False,
        eos_token_id=list(sampling.stop), pad_token_id=1,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [10_000, 60])
def test_greedy_answers_are_those_of_model_generate_without_padding(kind, budget):
    model: Any = make_model(kind, tie_word_embeddings=False)  # tied, it repeats itself
    sampling = Sampling(20, stop=tuple(range(0, 400, 11)))  # rows end at different times
    found = answers_of(model, prompts_of(ROWS), sampling, budget)
    expected = {f"q{n}": alone(model, ids, sampling) for n, ids in enumerate(ROWS)}
    assert {name: answer.answer_ids for name, answer in found.items()} == expected
    lengths = {len(ids) for ids in expected.values()}
    assert len(lengths) > 2, "all end together: nothing leaves the batch"
    for name, answer in found.items():
        ended = expected[name][-1] in sampling.stop
        assert answer.stop == ("end of turn" if ended else "length")
        assert answer.tokens == len(expected[name])
        assert answer.text == make_tokenizer().decode(
            expected[name], skip_special_tokens=True
        ).strip()  # fmt: skip


def test_a_sampled_answer_depends_on_its_own_seed_alone():
    model = make_model()
    sampling = Sampling(16, 0.95, tuple(range(0, 400, 11)))
    together = answers_of(model, prompts_of(ROWS, 0.9), sampling)
    for budget, prompts in ((60, prompts_of(ROWS, 0.9)), (10_000, prompts_of(ROWS, 0.9)[::-1])):
        assert answers_of(model, prompts, sampling, budget) == together
    for prompt in prompts_of(ROWS, 0.9):
        found = answers_of(model, [prompt], sampling)
        assert found == {prompt.question_id: together[prompt.question_id]}
    again = answers_of(model, prompts_of(ROWS, 0.9, seed=1), sampling)
    assert all(again[name].answer_ids != together[name].answer_ids for name in together)


def test_temperatures_share_a_batch():
    model, sampling = make_model(), Sampling(8, stop=(1,))
    greedy, warm = prompts_of(ROWS), prompts_of(ROWS, 0.9)
    renamed = [prompt._replace(question_id=f"{prompt.question_id} warm") for prompt in warm]
    mixed = answers_of(model, [*greedy, *renamed], sampling)
    for name, answer in answers_of(model, greedy, sampling).items():
        assert mixed[name].answer_ids == answer.answer_ids
    for name, answer in answers_of(model, warm, sampling).items():
        assert mixed[f"{name} warm"].answer_ids == answer.answer_ids


def probabilities(model, ids, temperature, top_p=1.0) -> np.ndarray:
    """Of the next token, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[:, -1].double() / temperature
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)  # pyright: ignore[reportArgumentType]
    return logits.softmax(-1)[0].numpy()


def p_value(counts, expected) -> float:
    """Pearson's chi-square; tokens that are hardly expected are one bin."""
    rare = expected * counts.sum() < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum()) * counts.sum()
    return float(chisquare(observed[wanted > 0], wanted[wanted > 0]).pvalue)


def drawn(model, ids, temperature, top_p, number) -> np.ndarray:
    prompts = [
        Prompt("q", 0, temperature, n, prompt_seed(0, "q", 0, temperature, n), (), ids)
        for n in range(number)
    ]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[:, -1].expand(number, -1)
    sampler = TokenSampler(prompts, 3, top_p, torch.device("cpu"))
    return np.bincount(sampler.draw(logits, 2).numpy(), minlength=logits.shape[1])


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.3, 1.0), (1.0, 0.8)])
def test_tokens_are_drawn_with_softmaxs_probabilities(temperature, top_p):
    model, ids = make_model(), [5, 6, 7]
    counts = drawn(model, ids, temperature, top_p, 10_000)
    expected = probabilities(model, ids, temperature, top_p)
    assert counts[expected == 0].sum() == 0
    assert p_value(counts, expected) > 0.01
    # The test would tell: it refuses a neighbouring temperature.
    assert p_value(counts, probabilities(model, ids, temperature * 1.4)) < 1e-6


def test_answers_have_the_models_distribution():
    """The second token's, over all first ones, through the whole backend."""
    model, ids, number = make_model(initializer_range=0.4), [5, 6, 7], 1500
    prompts = [
        Prompt(f"q{n}", 0, 0.7, 0, prompt_seed(3, f"q{n}", 0, 0.7, 0), (), ids)
        for n in range(number)
    ]
    answers = answers_of(model, prompts, Sampling(2))
    second = np.bincount([a.answer_ids[1] for a in answers.values()], minlength=400)
    first = probabilities(model, ids, 0.7)
    likely = np.argsort(-first)[:300]
    assert first[likely].sum() > 0.999
    expected = sum(first[t] * probabilities(model, [*ids, int(t)], 0.7) for t in likely)
    assert p_value(second, expected / expected.sum()) > 0.01


def test_no_token_without_probability_is_drawn_and_nan_is_told():
    prompts = prompts_of([[1]] * 500, 1.0)
    sampler = TokenSampler(prompts, 1, 1.0, torch.device("cpu"))
    sampler._uniform[0], sampler._uniform[1] = 0.0, 1 - 2**-53
    logits = torch.full((500, 9), -torch.inf)
    logits[:, [3, 5]] = torch.tensor([0.1, 0.4])
    tokens = sampler.draw(logits, 0).tolist()
    assert set(tokens) == {3, 5}
    assert tokens[:2] == [3, 5]
    logits[7, 2] = torch.nan
    assert [n for n, token in enumerate(sampler.draw(logits, 0)) if token < 0] == [7]


def test_a_broken_model_is_told_by_question():
    model = make_model()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(FPOError, match="question 'q2': the model's logits are not finite"):
        answers_of(model, prompts_of(ROWS), Sampling(4))


def test_an_answer_ends_where_the_models_context_ends():
    model = make_model(max_position_embeddings=16)
    found = answers_of(model, prompts_of(ROWS), Sampling(8))
    assert {name: len(answer.answer_ids) for name, answer in found.items()} == {
        "q0": 8, "q1": 8, "q2": 3, "q3": 8, "q4": 8, "q5": 8
    }  # fmt: skip
    with pytest.raises(FPOError, match=r"question 'q0', turn 1: the prompt has 16 tokens"):
        answers_of(model, prompts_of([[5] * 16]), Sampling(8))


def test_out_of_memory_halves_the_budget_once(caplog):
    sampling = Sampling(12, stop=(1,))
    expected = answers_of(make_model(), prompts_of(ROWS, 0.9), sampling)

    def short_of_memory(rows):
        """The model as on a GPU that holds so many rows of such a length."""
        model = make_model()

        def refuse(_module, _args, kwargs):
            if len(kwargs["input_ids"]) > rows and kwargs["attention_mask"].shape[1] > 15:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        model.model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    with caplog.at_level(logging.WARNING):
        budget = TokenBudget(150, of="held", setting="resources.generation_tokens", longest="most")
        model, tokenizer = short_of_memory(3), make_tokenizer()
        found = TransformersBackend(model, tokenizer, sampling, budget).generate(
            prompts_of(ROWS, 0.9)
        )
        assert {a.prompt: a for a in map(hashable, found)} == expected
    assert "half the tokens held, 75 (resources.generation_tokens)" in caplog.text
    with pytest.raises(FPOError, match=r"out of memory with 75 tokens held.*generation_tokens fur"):
        list(
            TransformersBackend(
                short_of_memory(1), tokenizer, sampling,
                TokenBudget(150, of="held", setting="resources.generation_tokens", longest="most"),
            ).generate(prompts_of(ROWS, 0.9))
        )  # fmt: skip


def test_the_budget_that_is_found():
    model = make_model()
    assert cached_bytes(model) == 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, size, bytes
    assert answer_budget(model, 77).tokens == 77
    assert answer_budget(model, "auto").tokens == 32_768


def test_seeds_differ_in_everything_that_tells_answers_apart():
    seeds = {
        prompt_seed(seed, name, turn, temperature, sample)
        for seed in (0, 1)
        for name in ("a", "b")
        for turn in (0, 1)
        for temperature in (0.5, 1.0)
        for sample in (0, 1)
    }
    assert len(seeds) == 32
    assert all(0 <= seed < 2**31 for seed in seeds)
    # Part of what a stored answer is: another derivation would give other answers.
    digest = hashlib.sha256(b'[0, "a", 0, 1.0, 0]').hexdigest()
    assert prompt_seed(0, "a", 0, 1, 0) == int(digest[:8], 16) // 2


# --- prompts


@pytest.fixture
def chat():
    return ChatFormat(make_tokenizer(), "model")


def test_the_second_turns_prompt_contains_the_first_answer(chat):
    questions = [Question("m", ("the fox?", "and the dog?")), Question("s", ("over?",))]
    model, wanted = make_model(), Wanted((0.0, 0.8), 2, seed=5)
    stop = chat.end_tokens()
    assert stop == (1,)
    backend = TransformersBackend(model, chat.tokenizer, Sampling(6, stop=stop), TokenBudget(9_999))
    found = {
        (a.prompt.question_id, a.prompt.temperature, a.prompt.sample, a.prompt.turn): a
        for a in answer_questions(backend, questions, wanted, chat)
    }
    keys = [(0.0, 0), (0.8, 0), (0.8, 1)]  # greedy ones are all the same: one
    assert set(found) == {(q, *key, t) for q, t in (("m", 0), ("m", 1), ("s", 0)) for key in keys}
    for key in keys:
        first, second = found["m", *key, 0], found["m", *key, 1]
        text = (
            "<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\n"
            f"{first.text}<|im_end|>\n<|im_start|>user\nand the dog?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert chat.tokenizer.decode(second.prompt.ids) == text
        assert second.prompt.messages[1] == {"role": "assistant", "content": first.text}
    seeds = [answer.prompt.seed for answer in found.values()]
    assert len(set(seeds)) == len(seeds)
    assert found["m", 0.8, 0, 0].answer_ids != found["m", 0.8, 1, 0].answer_ids


def test_questions_that_cannot_be_told_apart_or_ask_nothing_are_refused():
    with pytest.raises(FPOError, match="no question"):
        check_questions([])
    with pytest.raises(FPOError, match="an id that occurs twice: 'a'"):
        check_questions([Question("a", ("x",)), Question("a", ("y",)), Question("b", ("z",))])
    with pytest.raises(FPOError, match="a turn without text: 'a', 'b', 'c' and 1 more"):
        check_questions(
            [Question("a", ()), *(Question(name, ("x", " ")) for name in ("b", "c", "d"))]
        )


def test_prompts_that_do_not_fit_are_refused_by_question(chat):
    short, long = Question("short", ("the fox",)), Question("long", ("fox dog " * 60,))
    two = Question("two", ("the fox", "the dog"))
    check_prompts([short, two], chat, 32, 120)
    with pytest.raises(FPOError, match=r"context of 120 tokens, which leaves no room.*: 'long'"):
        check_prompts([short, long], chat, 32, 120)
    with pytest.raises(FPOError, match=r"max_new_tokens=110 fill.*\(lower max_new_tokens\): 'two'"):
        check_prompts([short, two], chat, 110, 120)


def test_exactly_one_bos(caplog):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{{ bos_token }}" + plain
    question = [Question("a", ("the fox",))]
    with caplog.at_level(logging.INFO):
        check_prompts(question, ChatFormat(tokenizer, "model"), 8, 500)
    assert f"begins with [{tokenizer.bos_token_id}, 0," in caplog.text
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + plain
    with pytest.raises(FPOError, match=r"BOS \(302\) twice in front .*: 'a'"):
        check_prompts(question, ChatFormat(tokenizer, "model"), 8, 500)
    # A tokenizer that writes BOS in front of other text, and a template that does not.
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = plain
    with pytest.raises(FPOError, match=r"does not begin with BOS \(302\).*: 'a'"):
        check_prompts(question, ChatFormat(tokenizer, "model"), 8, 500)


def test_a_template_that_refuses_or_ends_nothing_is_told(chat):
    chat.tokenizer.chat_template = "{{ raise_exception('no such turn') }}"
    with pytest.raises(FPOError, match="question 'a': the chat template refuses it: no such turn"):
        check_prompts([Question("a", ("the fox",))], chat, 8, 500)
    chat.tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(FPOError, match="writes nothing after an answer"):
        chat.end_tokens()


def test_vllm_is_asked_for_where_it_is_missing():
    with pytest.raises(FPOError, match="pip install vllm"):
        check_vllm()
