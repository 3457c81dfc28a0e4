"""The metrics of a run with bootstrap intervals, from per-pair scores.

The interval is a paired bootstrap over held-out pairs: pairs are drawn with replacement, and
policy, reference and their difference are computed on the same draw.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fpo_core.evaluation.heldout import HeldoutScores


class Estimate(NamedTuple):
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Metric(NamedTuple):
    """One line of the before/after table."""

    key: str
    label: str
    description: str
    unit: str
    better: str  # higher, lower or neither
    reference: Estimate | None
    policy: Estimate
    difference: Estimate | None


class Answered(NamedTuple):
    """Per-prompt quantities [Q] of the answers that policy and reference sampled."""

    pair_ids: list[str]  # of the held-out pairs whose prompts were answered
    policy_entropy: np.ndarray  # mean over the answer's sampled tokens, nats, untempered
    reference_entropy: np.ndarray
    policy_tokens: np.ndarray  # of the answer, without the end of the turn
    reference_tokens: np.ndarray


class Definition(NamedTuple):
    """What a metric is: its words, and its value on each pair (or prompt), whose mean it is."""

    label: str
    description: str
    unit: str
    better: str
    policy: Callable[[Any], np.ndarray]  # of HeldoutScores or Answered
    reference: Callable[[Any], np.ndarray] | None  # None: not defined for the reference


def _average_margin(logps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    averages = logps / tokens
    return averages[:, 0] - averages[:, 1]


def _mean_entropy(entropy: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return (entropy / tokens).mean(1)


def _reward_margin(scores: HeldoutScores) -> np.ndarray:
    rewards = scores.policy_logps - scores.reference_logps
    return rewards[:, 0] - rewards[:, 1]


METRICS: dict[str, Definition] = {
    "accuracy": Definition(
        "Accuracy (average log-prob)",
        "share of pairs whose chosen answer has the higher log-prob a token",
        "share", "higher",
        lambda s: _average_margin(s.policy_logps, s.tokens) > 0,
        lambda s: _average_margin(s.reference_logps, s.tokens) > 0,
    ),
    "reward_accuracy": Definition(
        "Accuracy (implicit reward)",
        "share of pairs whose chosen answer gained more log-prob over the reference",
        "share", "higher", lambda s: _reward_margin(s) > 0, None,
    ),
    "margin": Definition(
        "Average log-prob margin",
        "log-prob a token of chosen minus rejected",
        "nats", "higher",
        lambda s: _average_margin(s.policy_logps, s.tokens),
        lambda s: _average_margin(s.reference_logps, s.tokens),
    ),
    "kl_chosen": Definition(
        "Sequential KL, chosen",
        "sum over scored tokens of KL(reference || policy), on chosen answers",
        "nats", "neither", lambda s: s.kl[:, 0], None,
    ),
    "kl_rejected": Definition(
        "Sequential KL, rejected",
        "sum over scored tokens of KL(reference || policy), on rejected answers",
        "nats", "neither", lambda s: s.kl[:, 1], None,
    ),
    "kl_margin": Definition(
        "Sequential KL, margin",
        "that on rejected answers minus that on chosen ones",
        "nats", "neither", lambda s: s.kl[:, 1] - s.kl[:, 0], None,
    ),
    "heldout_entropy": Definition(
        "Entropy on held-out answers",
        "mean over scored tokens of the next-token distribution's entropy, on both answers",
        "nats", "neither",
        lambda s: _mean_entropy(s.policy_entropy, s.tokens),
        lambda s: _mean_entropy(s.reference_entropy, s.tokens),
    ),
    "discrepancy_chosen": Definition(
        "Feature discrepancy, chosen",
        "mean over pairs of D (Eq. 10) on chosen answers; 0 for the reference",
        "", "lower", lambda s: s.discrepancy[:, 0], None,
    ),
    "discrepancy_rejected": Definition(
        "Feature discrepancy, rejected",
        "mean over pairs of D (Eq. 10) on rejected answers; 0 for the reference",
        "", "lower", lambda s: s.discrepancy[:, 1], None,
    ),
    "discrepancy_margin": Definition(
        "Feature discrepancy, margin",
        "that on rejected answers minus that on chosen ones",
        "", "neither", lambda s: s.discrepancy[:, 1] - s.discrepancy[:, 0], None,
    ),
    "discrepancy": Definition(
        "Feature discrepancy",
        "mean over pairs and both sides of D (Eq. 10); 0 for the reference",
        "", "lower", lambda s: s.discrepancy.mean(1), None,
    ),
}  # fmt: skip

ANSWER_METRICS: dict[str, Definition] = {
    "entropy": Definition(
        "Entropy of sampled answers",
        "mean over sampled tokens of the next-token distribution's entropy (untempered)",
        "nats", "neither", lambda a: a.policy_entropy, lambda a: a.reference_entropy,
    ),
    "answer_length": Definition(
        "Length of sampled answers",
        "mean over prompts of the tokens sampled before the end of the turn or the length limit",
        "tokens", "neither", lambda a: a.policy_tokens, lambda a: a.reference_tokens,
    ),
}  # fmt: skip


def heldout_metrics(scores: HeldoutScores, resamples: int, seed: int) -> list[Metric]:
    """All metrics of a policy on held-out pairs."""
    draws = bootstrap_draws(len(scores.pair_ids), resamples, seed)
    return [paired_metric(key, one, scores, draws) for key, one in METRICS.items()]


def paired_metric(
    key: str, definition: Definition, scores: HeldoutScores | Answered, draws: np.ndarray
) -> Metric:
    """One metric with intervals for policy, reference and their difference."""
    policy = np.asarray(definition.policy(scores), dtype=np.float64)
    reference = difference = None
    if definition.reference is not None:
        before = np.asarray(definition.reference(scores), dtype=np.float64)
        reference, difference = estimate(before, draws), estimate(policy - before, draws)
    return Metric(
        key, definition.label, definition.description, definition.unit, definition.better,
        reference, estimate(policy, draws), difference,
    )  # fmt: skip


def answer_metrics(answered: Answered, resamples: int, seed: int) -> list[Metric]:
    """All metrics of sampled answers; prompts are what is drawn."""
    draws = bootstrap_draws(len(answered.pair_ids), resamples, seed)
    return [paired_metric(key, one, answered, draws) for key, one in ANSWER_METRICS.items()]


def bootstrap_draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """Row numbers [resamples, count] drawn with replacement."""
    return np.random.default_rng(seed).integers(0, count, size=(resamples, count))


def estimate(values: np.ndarray, draws: np.ndarray) -> Estimate:
    """Mean of per-pair values [P] with its 95 % percentile bootstrap interval."""
    means = np.asarray(values, dtype=np.float64)[draws].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(np.mean(values)), float(low), float(high))


def metric_record(metric: Metric) -> dict[str, Any]:
    """A metric as JSON."""
    record = metric._asdict()
    for name in ("reference", "policy", "difference"):
        value = record[name]
        record[name] = None if value is None else value._asdict()
    return record
