"""The entropy of the distributions that an answer was sampled from."""

from collections.abc import Sequence
from typing import Any

import torch

from fpo_core.logprobs import entropies, output_head


@torch.no_grad()
def mean_entropy(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Mean entropy in nats of the model's distribution at the positions that predict ``answer``."""
    row = torch.tensor([[*prompt, *answer]], device=model.device)
    hidden = model.get_decoder()(input_ids=row, use_cache=False).last_hidden_state[0]
    scored = hidden[len(prompt) - 1 : -1]
    return float(entropies(scored, output_head(model)).mean())
