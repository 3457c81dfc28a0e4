"""Answers sampled by a transformers model in this process.

Prompts are taken longest first, so that a batch's are about equally long and little is padded, and
as many as a budget of tokens holds. A row that has ended leaves the batch: what a step costs falls
with the rows, where ``model.generate`` carries all to the end of the longest.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from fpo_core.data.batches import by_length, that_fit
from fpo_core.errors import FPOError
from fpo_core.generation.answers import END_OF_TURN, LENGTH, Generated, Prompt, Sampling
from fpo_core.generation.sampler import TokenSampler
from fpo_core.models.budget import TokenBudget, affordable_tokens, is_out_of_memory

SETTING = "resources.generation_tokens"
# More rows than this no longer make a step cheaper a row.
CPU_ROWS, GPU_ROWS = 32, 256
CPU_TOKENS = 32_768
# Ended rows leave together, when they are this share: each time the cache is copied once.
LEAVING = 1 / 8


class TransformersBackend:
    """Answers with a model.

    Args:
        model: causal LM on its device.
        tokenizer: turns answers into text.
        sampling: settings.
        budget: tokens held at a time, prompts and answers with their padding; halved, once, when
            the memory does not suffice.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: Sampling, budget: TokenBudget) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._sampling, self._budget = sampling, budget
        self._rows = GPU_ROWS if model.device.type == "cuda" else CPU_ROWS

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Generated]:
        """Answer all prompts, each as soon as it is done.

        Raises:
            FPOError: a prompt fills the model's context, or memory is short of half the budget.
        """
        limits = [self._limit(prompt) for prompt in prompts]
        lengths = [len(p.ids) + limit for p, limit in zip(prompts, limits, strict=True)]
        todo = by_length(lengths)
        while todo:
            taken = that_fit(todo, lengths, self._budget.tokens)[: self._rows]
            done: set[int] = set()
            try:
                for row, ids in self._answered(taken, prompts, limits):
                    done.add(row)
                    yield self._generated(prompts[row], ids)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._budget.halve(error)
            todo = [row for row in todo if row not in done]

    def _answered(
        self, taken: Sequence[int], prompts: Sequence[Prompt], limits: Sequence[int]
    ) -> Iterator[tuple[int, list[int]]]:
        batch = _Batch(
            self._model, [prompts[row] for row in taken], [limits[row] for row in taken],
            self._sampling,
        )  # fmt: skip
        for place, ids in batch.answers():
            yield taken[place], ids

    def _limit(self, prompt: Prompt) -> int:
        """The most tokens of an answer; less than wanted where the context ends."""
        context = context_length(self._model.config)
        room = context - len(prompt.ids)
        if room < 1:
            raise FPOError(
                f"question {prompt.question_id!r}, turn {prompt.turn + 1}: the prompt has "
                f"{len(prompt.ids)} tokens, which fill the model's context of {context}; leave the "
                f"question out, or lower max_new_tokens where it is an earlier answer that fills it"
            )
        return min(room, self._sampling.max_new_tokens)

    def _generated(self, prompt: Prompt, ids: list[int]) -> Generated:
        text = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        ended = ids[-1] in self._sampling.stop
        return Generated(prompt, ids, text, END_OF_TURN if ended else LENGTH, len(ids))


class _Batch:
    """Rows that are answered together."""

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], limits: Sequence[int], sampling: Sampling
    ) -> None:
        self._model, self._prompts, self._limits = model, prompts, limits
        self._stop = frozenset(sampling.stop)
        self._sampler = TokenSampler(prompts, max(limits), sampling.top_p, model.device)
        self._cache = DynamicCache(config=model.config)
        self._ids, self._mask = left_padded([prompt.ids for prompt in prompts], model.device)

    def answers(self) -> Iterator[tuple[int, list[int]]]:
        """Each row's place in the batch and its answer, as it ends."""
        answers: list[list[int]] = [[] for _ in self._prompts]
        rows, open_ = list(range(len(answers))), set(range(len(answers)))
        for step in range(max(self._limits)):
            tokens = self._sampler.draw(self._logits(), step)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row not in open_:
                    continue
                self._check(row, token)
                answers[row].append(token)
                if token in self._stop or step + 1 == self._limits[row]:
                    open_.discard(row)
                    yield row, answers[row]
            if not open_:
                return
            self._append(tokens)
            if len(rows) - len(open_) >= LEAVING * len(rows):
                rows = self._keep(rows, open_)

    def _check(self, row: int, token: int) -> None:
        if token < 0:
            raise FPOError(
                f"question {self._prompts[row].question_id!r}: the model's logits are not finite; "
                f"its weights may be broken, or its dtype too narrow"
            )

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Of each row's next token: [R, V]."""
        positions = (self._mask.cumsum(-1) - 1).clamp_min(0)[:, -self._ids.shape[1] :]
        out = self._model(
            input_ids=self._ids, attention_mask=self._mask, position_ids=positions,
            past_key_values=self._cache, use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        return out.logits[:, -1]

    def _append(self, tokens: Tensor) -> None:
        self._ids = tokens[:, None].clamp_min(0)  # of a row that has ended, anything
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)

    def _keep(self, rows: list[int], open_: set[int]) -> list[int]:
        """Let the rows go that have ended."""
        places = [place for place, row in enumerate(rows) if row in open_]
        kept = torch.tensor(places, device=self._ids.device)
        self._cache.batch_select_indices(kept)
        self._sampler.keep(kept)
        self._ids, self._mask = self._ids[kept], self._mask[kept]
        return [rows[place] for place in places]


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Token ids [R, L], filled on the left with a token that the mask [R, L] leaves out."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def context_length(config: Any) -> int:
    """Tokens that a model can take, by its configuration."""
    return config.get_text_config().max_position_embeddings


def answer_budget(model: Any, setting: int | Literal["auto"]) -> TokenBudget:
    """The budget that a recipe gives, or what the memory has room for.

    Args:
        model: on its device.
        setting: the recipe's.
    """
    tokens = CPU_TOKENS
    if setting != "auto":
        tokens = setting
    elif model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        tokens = affordable_tokens(free, cached_bytes(model), GPU_ROWS * 4096)
    return TokenBudget(
        tokens, of="held by answers in the making", setting=SETTING, longest="max_new_tokens"
    )


@torch.no_grad()
def cached_bytes(model: Any) -> int:
    """Bytes that a token takes in the cache: keys and values of all layers."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device),
          past_key_values=cache, use_cache=True)  # fmt: skip
    layers: list[Any] = cache.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
