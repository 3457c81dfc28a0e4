"""Metrics of a policy on held-out pairs, pair by pair, so that intervals can be computed later."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.data.batches import PairBatch, batches_by_length, collate
from fpo_core.evaluation.audit import Groups, Moments, MomentSums
from fpo_core.features.discrepancy import Responses, feature_discrepancy
from fpo_core.features.pool import pool_features
from fpo_core.logprobs import entropies, output_head, sum_by_response
from fpo_core.models.forward import ReferenceSide, forward_pairs
from fpo_core.progress import not_shown
from fpo_core.sae.coder import AttachedSae
from fpo_core.training.cached import cached_batch
from fpo_core.training.examples import Example


class HeldoutScores(NamedTuple):
    """Per-pair quantities [P, 2] (chosen, rejected), and how far the pooled features moved."""

    pair_ids: list[str]
    tokens: np.ndarray  # scored tokens
    policy_logps: np.ndarray  # summed
    reference_logps: np.ndarray  # summed, from the cache
    kl: np.ndarray  # sequential KL(reference || policy), summed over scored tokens, nats
    policy_entropy: np.ndarray  # of the next-token distribution, summed over scored tokens, nats
    reference_entropy: np.ndarray
    discrepancy: np.ndarray  # feature discrepancy D (Eq. 10)
    features: Moments  # of the pooled features' changes
    groups: Moments  # and of groups of them

    def by_pair(self) -> dict[str, np.ndarray]:
        """The quantities [P, 2], by name."""
        return {name: getattr(self, name) for name in BY_PAIR}


BY_PAIR = HeldoutScores._fields[1:-2]


@torch.no_grad()
def score_heldout(
    policy: Any,
    reference: Any,
    examples: list[Example],
    sae: AttachedSae,
    groups: Groups,
    *,
    k: int,
    tokens_per_batch: int,
    on_pairs: Callable[[int], None] = not_shown,
) -> HeldoutScores:
    """Run policy and reference over the held-out pairs.

    Args:
        policy: the trained model.
        reference: the model it started from (live, for the KL; its log-probs come from the cache).
        examples: held-out pairs with their cached reference side.
        sae: the SAE that the examples' first cache is of.
        groups: features whose mean is followed.
        k: top-k of the discrepancy.
        tokens_per_batch: most tokens a forward pass, padding included.
        on_pairs: told how many pairs were done after each batch.
    """
    count, coder = len(examples), sae.coder
    scored = {name: np.zeros((count, 2)) for name in BY_PAIR}
    features, grouped = MomentSums(coder.d_sae), MomentSums(len(groups.names))
    heads = output_head(policy), output_head(reference)
    for rows in batches_by_length([e.ids.length for e in examples], tokens_per_batch):
        group = [examples[row] for row in rows]
        batch = collate([example.ids for example in group], device=str(policy.device))
        ref = forward_pairs(reference, batch, [sae.hookpoint])
        live = ReferenceSide(ref.hidden, heads[1])
        out = forward_pairs(policy, batch, [sae.hookpoint], live)
        assert out.kl is not None
        cached = cached_batch(group, str(policy.device))

        def summed(values: Tensor, batch: PairBatch = batch) -> Tensor:
            return sum_by_response(values, batch.response, len(batch.lengths))

        responses = Responses(out.activations[0], batch.response, batch.lengths)
        found = {
            "tokens": batch.lengths,
            "policy_logps": out.logps,
            "reference_logps": cached.logps,
            "kl": out.kl,
            "policy_entropy": summed(entropies(out.hidden, heads[0])),
            "reference_entropy": summed(entropies(ref.hidden, heads[1])),
            "discrepancy": feature_discrepancy(coder, responses, cached.pooled[0], k).values,
        }
        for name, values in found.items():
            scored[name][rows] = values.reshape(-1, 2).cpu()
        pooled = [
            pool_features(coder, x, batch.response, batch.lengths).cpu().double().numpy()
            for x in (ref.activations[0], out.activations[0])
        ]
        features.add(*pooled)
        grouped.add(*map(groups.means, pooled))
        on_pairs(len(rows))
    return HeldoutScores(
        [example.ids.pair_id for example in examples], **scored,
        features=features.moments(), groups=grouped.moments(),
    )  # fmt: skip
