"""Draws tokens: each row with its own random numbers, whatever rows are beside it.

Inverse transform sampling: a uniform number u picks the first token whose cumulative probability
exceeds u. A row needs one number a token, drawn ahead on the CPU from the row's seed, so a GPU
draws the same as a CPU, and there is no generator in the loop.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from fpo_core.generation.answers import Prompt


class TokenSampler:
    """The random numbers of a batch's rows.

    Args:
        prompts: of the rows, each with its temperature and seed.
        max_new_tokens: how many tokens may be drawn for a row.
        top_p: smallest set of likeliest tokens with this probability that is drawn from; 1: all.
        device: of the logits.
    """

    def __init__(
        self, prompts: Sequence[Prompt], max_new_tokens: int, top_p: float, device: torch.device
    ) -> None:
        uniform = torch.stack([_uniform(prompt.seed, max_new_tokens) for prompt in prompts])
        self._uniform = uniform.to(device)  # [R, T]
        self._temperature = torch.tensor([p.temperature for p in prompts], device=device)  # [R]
        self._greedy = all(prompt.temperature == 0 for prompt in prompts)
        self._top_p = TopPLogitsWarper(top_p) if top_p < 1 else None

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self._uniform, self._temperature = self._uniform[rows], self._temperature[rows]

    def draw(self, logits: Tensor, step: int) -> Tensor:
        """Each row's next token; -1 where its logits are not finite.

        Args:
            logits: [R, V].
            step: number of the token in its answer, from 0.
        """
        logits = logits.float()
        highest, tokens = logits.max(-1)
        if not self._greedy:
            sampled = self._sampled(logits, self._uniform[:, step, None])
            tokens = torch.where(self._temperature > 0, sampled, tokens)
        return tokens.masked_fill(~highest.isfinite(), -1)

    def _sampled(self, logits: Tensor, uniform: Tensor) -> Tensor:
        temperature = torch.where(self._temperature > 0, self._temperature, 1.0)
        scores = logits / temperature[:, None]
        if self._top_p is not None:
            scores = self._top_p(None, scores)  # pyright: ignore[reportArgumentType]
        # In float64: in float32 the rounding of 256,000 summands would show.
        cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # Below the total even where the product rounds up to it: past it there is no token.
        threshold = torch.minimum(uniform * total, total * (1 - 1e-15))
        # `right`: a token without probability, which repeats its predecessor's sum, is passed over.
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def _uniform(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)
