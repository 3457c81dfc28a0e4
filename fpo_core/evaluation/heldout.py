"""Metrics of a policy on held-out pairs, pair by pair, so that intervals can be computed later."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fpo_core.data.batches import batches_by_length, collate
from fpo_core.features.discrepancy import feature_discrepancy
from fpo_core.features.pool import pool_features
from fpo_core.logprobs import kl_divergences, output_head, sum_by_response
from fpo_core.models.forward import forward_pairs
from fpo_core.progress import not_shown
from fpo_core.sae.coder import SparseCoder
from fpo_core.training.examples import Example, reference_features


class HeldoutScores(NamedTuple):
    """Per-pair quantities [P, 2] (chosen, rejected) and the pooled features' means."""

    pair_ids: list[str]
    tokens: np.ndarray  # scored tokens
    policy_logps: np.ndarray  # summed
    reference_logps: np.ndarray  # summed, from the cache
    kl: np.ndarray  # sequential KL(reference || policy), summed over scored tokens, nats
    discrepancy: np.ndarray  # feature discrepancy D
    policy_means: np.ndarray  # [2, d_sae] mean pooled feature, chosen and rejected
    reference_means: np.ndarray  # [2, d_sae]


@torch.no_grad()
def score_heldout(
    policy: Any,
    reference: Any,
    examples: list[Example],
    coder: SparseCoder,
    layer: int,
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
        coder: the SAE.
        layer: its decoder block.
        k: top-k of the discrepancy.
        tokens_per_batch: most tokens a forward pass, padding included.
        on_pairs: told how many pairs were done after each batch.
    """
    count = len(examples)
    tokens, logps, cached, kl, discrepancy = (np.zeros((count, 2)) for _ in range(5))
    means = np.zeros((2, 2, coder.d_sae))  # model, side, feature
    for rows in batches_by_length([e.ids.length for e in examples], tokens_per_batch):
        group = [examples[row] for row in rows]
        batch = collate([example.ids for example in group], device=str(policy.device))
        out = forward_pairs(policy, batch, layer)
        ref = forward_pairs(reference, batch, layer)
        divergences = kl_divergences(
            ref.hidden, output_head(reference), out.hidden, output_head(policy)
        )
        stored, cutoff = reference_features(group, str(policy.device))
        distance = feature_discrepancy(
            coder, out.activations, batch.response, batch.lengths, stored, cutoff, k
        )
        tokens[rows] = batch.lengths.reshape(-1, 2).cpu()
        logps[rows] = out.logps.reshape(-1, 2).cpu()
        cached[rows] = [example.logps for example in group]
        kl[rows] = (
            sum_by_response(divergences, batch.response, len(batch.lengths)).reshape(-1, 2).cpu()
        )
        discrepancy[rows] = distance.values.reshape(-1, 2).cpu()
        for model, activations in enumerate((out.activations, ref.activations)):
            pooled = pool_features(coder, activations, batch.response, batch.lengths).cpu()
            means[model, 0] += pooled[0::2].sum(0).numpy()
            means[model, 1] += pooled[1::2].sum(0).numpy()
        on_pairs(len(rows))
    means /= count
    return HeldoutScores(
        [example.ids.pair_id for example in examples],
        tokens, logps, cached, kl, discrepancy, means[0], means[1],
    )  # fmt: skip
