"""Per-feature statistics, gathered in the pass that makes the features.

One ``FeatureAccumulator`` a shard; accumulators of shards add up, so an interrupted pass keeps
what it has and the final table does not depend on which process did which shard.

Shapes: N scored tokens, R responses, F = d_sae, E = examples kept a feature.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class FeatureAccumulator:
    """Sums over tokens and responses, and the strongest examples, of every feature.

    Args:
        d_sae: number of features.
        examples: examples kept a feature.
        device: of the activations that will be added.
    """

    def __init__(
        self, d_sae: int, examples: int, device: torch.device | str = "cpu"
    ) -> None:  # fmt: skip
        self.num_examples = examples
        self.tokens = 0
        self.responses = np.zeros(2, dtype=np.int64)  # chosen, rejected
        self.active = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.float64, device=device)
        self.peak = torch.zeros(d_sae, device=device)
        self.side_total = torch.zeros(2, d_sae, dtype=torch.float64, device=device)
        self.top_values = torch.zeros(0, d_sae, device=device)
        self.top_tokens = torch.zeros(0, d_sae, dtype=torch.int64, device=device)

    def add(self, acts: Tensor, first_token: int) -> None:
        """Count one chunk of token activations [n, F], numbered from ``first_token``."""
        self.tokens += len(acts)
        self.active += (acts > 0).sum(0)
        self.total += acts.sum(0, dtype=torch.float64)
        self.peak = torch.maximum(self.peak, acts.max(0).values)
        values, rows = torch.topk(acts, min(self.num_examples, len(acts)), dim=0)
        self.top_values = torch.cat([self.top_values, values])
        self.top_tokens = torch.cat([self.top_tokens, rows + first_token])
        if len(self.top_values) > self.num_examples:
            # Stable: among equal activations the token that came first is kept.
            order = torch.sort(self.top_values, dim=0, descending=True, stable=True).indices
            order = order[: self.num_examples]
            self.top_values = self.top_values.gather(0, order)
            self.top_tokens = self.top_tokens.gather(0, order)

    def add_pooled(self, pooled: Tensor, chosen: Tensor) -> None:
        """Count responses' pooled features [R, F]; ``chosen`` [R] marks their side."""
        for side, mask in enumerate((chosen, ~chosen)):
            self.responses[side] += int(mask.sum())
            self.side_total[side] += pooled[mask].sum(0, dtype=torch.float64)

    def columns(self, tokens: dict[str, np.ndarray]) -> dict[str, Any]:
        """The accumulator as columns, one row a feature.

        Args:
            tokens: ``pair_id``, ``side``, ``position`` of every token of the shard, by number.
        """
        values, numbers = self.top_values.cpu(), self.top_tokens.cpu()
        return {
            "feature": np.arange(len(self.active), dtype=np.uint32),
            "tokens": np.full(len(self.active), self.tokens, dtype=np.int64),
            "responses_chosen": np.full(len(self.active), self.responses[0], dtype=np.int64),
            "responses_rejected": np.full(len(self.active), self.responses[1], dtype=np.int64),
            "active": self.active.cpu().numpy(),
            "total": self.total.cpu().numpy(),
            "max": self.peak.cpu().numpy(),
            "total_chosen": self.side_total[0].cpu().numpy(),
            "total_rejected": self.side_total[1].cpu().numpy(),
            "examples": [
                _examples(values[:, feature].tolist(), numbers[:, feature].tolist(), tokens)
                for feature in range(len(self.active))
            ],
        }


def _examples(
    values: list[float], numbers: list[int], tokens: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {
            "pair_id": str(tokens["pair_id"][token]),
            "side": str(tokens["side"][token]),
            "position": int(tokens["position"][token]),
            "value": value,
        }
        for value, token in zip(values, numbers, strict=True)
        if value > 0
    ]


def merge_stats(shards: list[dict[str, Any]], examples: int) -> dict[str, Any]:
    """The statistics of all shards together, as columns of the ``stats`` table.

    Args:
        shards: each shard's accumulator columns, in order of the shards.
        examples: examples kept a feature.
    """

    def total(name: str) -> np.ndarray:
        return np.sum([np.asarray(shard[name]) for shard in shards], axis=0)

    tokens, active = total("tokens"), total("active")
    merged = []
    for feature in range(len(active)):
        found = [example for shard in shards for example in shard["examples"][feature]]
        found.sort(key=lambda example: -example["value"])  # stable: earlier shards first
        merged.append(found[:examples])
    return {
        "feature": np.arange(len(active), dtype=np.uint32),
        "density": (active / tokens).astype(np.float32),
        "mean": (total("total") / tokens).astype(np.float32),
        "max": np.max([np.asarray(shard["max"]) for shard in shards], axis=0).astype(np.float32),
        "mean_chosen": (total("total_chosen") / total("responses_chosen")).astype(np.float32),
        "mean_rejected": (total("total_rejected") / total("responses_rejected")).astype(np.float32),
        "examples": merged,
    }
