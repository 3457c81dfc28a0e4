"""Sampled answers, and the entropy of the distributions they were sampled from."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpo_core.logprobs import entropies, output_head
from fpo_core.progress import not_shown


class Answer(NamedTuple):
    """One sampled answer."""

    ids: list[int]  # without the end-of-turn token
    stop: str  # "end of turn" or "length"
    entropy: float  # mean over the sampled tokens, nats, of the untempered distribution


class Sampling(NamedTuple):
    """How answers are sampled."""

    max_new_tokens: int
    temperature: float
    seed: int


@torch.no_grad()
def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_id: int,
    pad_id: int,
    batch_size: int = 16,
    on_answers: Callable[[int], None] = not_shown,
) -> list[Answer]:
    """Answer every prompt.

    Args:
        model: causal LM.
        prompts: token ids, each ending in the opener of the assistant's turn.
        sampling: settings; the seed makes answers repeatable on one machine.
        end_id: the end-of-turn token.
        pad_id: token that fills prompts on the left.
        batch_size: prompts generated together.
        on_answers: told how many were done after each batch.
    """
    torch.manual_seed(sampling.seed)
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        group = prompts[start : start + batch_size]
        ids, mask = _left_padded(group, pad_id, model.device)
        sampled = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or None,
            top_k=0 if sampling.temperature > 0 else None,
            top_p=1.0 if sampling.temperature > 0 else None,
            eos_token_id=end_id,
            pad_token_id=pad_id,
        )
        answers += _finish(model, group, sampled[:, ids.shape[1] :], end_id)
        on_answers(len(group))
    return answers


def _finish(
    model: Any, prompts: Sequence[Sequence[int]], sampled: Tensor, end_id: int
) -> list[Answer]:
    answers = []
    for prompt, row in zip(prompts, sampled.tolist(), strict=True):
        ended = end_id in row
        ids = row[: row.index(end_id)] if ended else row
        # The end-of-turn token was sampled too: its distribution counts.
        scored = [*ids, end_id] if ended else ids
        answers.append(
            Answer(ids, "end of turn" if ended else "length", mean_entropy(model, prompt, scored))
        )
    return answers


@torch.no_grad()
def mean_entropy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Mean entropy in nats of the model's distribution at the positions that predict ``answer``."""
    row = torch.tensor([[*prompt, *answer]], device=model.device)
    hidden = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0]
    scored = hidden[len(prompt) - 1 : -1]
    return float(entropies(scored, output_head(model)).mean())


def _left_padded(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
