"""Runs against each other, metric by metric, with paired intervals.

Two policies answer for the same held-out pairs, so their difference is computed pair by pair and
bootstrapped on the same draws: what makes a pair hard for both does not widen its interval. A
metric is compared only where everything that it depends on is the same in all runs; the others are
refused by name, never put in one table.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fpo_core.errors import FPOError
from fpo_core.evaluation.heldout import BY_PAIR, HeldoutScores
from fpo_core.evaluation.metrics import (
    ANSWER_METRICS,
    METRICS,
    Answered,
    Definition,
    Estimate,
    bootstrap_draws,
    estimate,
)

PAIRS, PROMPTS, TOKENS = "held-out pairs", "prompts answered", "tokens of the held-out pairs"
REFERENCE, SAE, SAMPLING = "reference model", "SAE", "sampling"
SHOWN_IDS = 3


class Measured(NamedTuple):
    """What one run's evaluation measured."""

    name: str  # as the tables call the run
    heldout: HeldoutScores
    answered: Answered
    key: Mapping[str, str]  # what its scores depend on beside the pairs: REFERENCE, SAE, SAMPLING


class Difference(NamedTuple):
    """A run's metric minus another's, by their places among the runs."""

    run: int
    minus: int
    estimate: Estimate


class Compared(NamedTuple):
    """One metric of all runs."""

    key: str
    label: str
    description: str
    unit: str
    better: str
    reference: Estimate | None  # of the reference that all runs share
    runs: tuple[Estimate, ...]
    differences: tuple[Difference, ...]  # of each two runs, the later one minus the earlier


class Refused(NamedTuple):
    """A metric that these runs cannot be compared in."""

    key: str
    label: str
    reason: str


class Comparison(NamedTuple):
    """What the runs' evaluations say side by side."""

    names: tuple[str, ...]
    metrics: tuple[Compared, ...]
    refused: tuple[Refused, ...]
    pairs: int  # that held-out metrics are means over
    prompts: int  # that answers were sampled to


def depends_on(metric: str) -> tuple[str, ...]:
    """What has to be the same in two runs for a metric of theirs to be compared."""
    if metric in ANSWER_METRICS:
        return (PROMPTS, TOKENS, SAMPLING)
    if metric == "accuracy":  # a share of pairs, whatever their tokens are
        return (PAIRS,)
    if metric.startswith("discrepancy"):
        return (PAIRS, TOKENS, REFERENCE, SAE)
    if metric.startswith("kl") or metric == "reward_accuracy":
        return (PAIRS, TOKENS, REFERENCE)
    return (PAIRS, TOKENS)


def compare(runs: Sequence[Measured], resamples: int, seed: int) -> Comparison:
    """Every metric of the runs, with the paired difference of each two of them.

    Args:
        runs: at least two.
        resamples: bootstrap resamples; one set of draws serves all metrics and runs.
        seed: of the draws.

    Raises:
        FPOError: no metric can be compared; the reasons are in it.
    """
    assert len(runs) > 1
    refused = tuple(_refusals(runs))
    left_out = {one.key for one in refused}
    kept = {**METRICS, **ANSWER_METRICS}.keys() - left_out
    if not runs[0].answered.pair_ids:  # none was sampled in any: with some, it would be refused
        kept -= ANSWER_METRICS.keys()
    if not kept:
        reasons = "; ".join(dict.fromkeys(one.reason for one in refused))
        raise FPOError(f"these runs have no metric that can be compared: {reasons}")
    same_reference = len({run.key[REFERENCE] for run in runs}) == 1
    found: list[Compared] = []
    for part, definitions in (("heldout", METRICS), ("answered", ANSWER_METRICS)):
        wanted = {key: one for key, one in definitions.items() if key in kept}
        if not wanted:
            continue
        ids = getattr(runs[0], part).pair_ids
        scores = [in_order(getattr(run, part), ids, run.name) for run in runs]
        draws = bootstrap_draws(len(ids), resamples, seed)
        for key, one in wanted.items():
            found.append(_compared(key, one, scores, draws, same_reference))
    return Comparison(
        tuple(run.name for run in runs), tuple(found), refused,
        len(runs[0].heldout.pair_ids), len(runs[0].answered.pair_ids),
    )  # fmt: skip


def _compared(
    key: str, definition: Definition, scores: Sequence[Any], draws: np.ndarray, referenced: bool
) -> Compared:
    values = [np.asarray(definition.policy(one), dtype=np.float64) for one in scores]
    reference = None
    if referenced and definition.reference is not None:
        before = np.asarray(definition.reference(scores[0]), dtype=np.float64)
        reference = estimate(before, draws)
    return Compared(
        key, definition.label, definition.description, definition.unit, definition.better,
        reference, tuple(estimate(one, draws) for one in values),
        tuple(
            Difference(later, earlier, estimate(values[later] - values[earlier], draws))
            for earlier, later in itertools.combinations(range(len(values)), 2)
        ),
    )  # fmt: skip


def in_order(scores: Any, pair_ids: Sequence[str], name: str) -> Any:
    """Scores (``HeldoutScores`` or ``Answered``) with their rows in the order of these ids.

    Raises:
        FPOError: an id occurs twice, or the ids are not the same; the differences are listed.
    """
    rows = {pair_id: row for row, pair_id in enumerate(scores.pair_ids)}
    if len(rows) != len(scores.pair_ids):
        twice = sorted({one for one in scores.pair_ids if scores.pair_ids.count(one) > 1})
        raise FPOError(f"the evaluation of {name} has pairs more than once: {_listed(twice)}")
    told = _unequal(pair_ids, scores.pair_ids)
    if told:
        raise FPOError(f"the evaluation of {name} is on other pairs: {told}")
    order = [rows[pair_id] for pair_id in pair_ids]
    columns = BY_PAIR if isinstance(scores, HeldoutScores) else Answered._fields[1:]
    moved = {column: getattr(scores, column)[order] for column in columns}
    return scores._replace(pair_ids=list(pair_ids), **moved)


def _refusals(runs: Sequence[Measured]) -> list[Refused]:
    """The metrics that depend on something in which the runs differ."""
    common = set.intersection(*(set(run.heldout.pair_ids) for run in runs))
    why = {
        PAIRS: _differing_ids(runs, PAIRS, lambda run: run.heldout.pair_ids),
        PROMPTS: _differing_ids(runs, PROMPTS, lambda run: run.answered.pair_ids),
        TOKENS: told_apart(TOKENS, {run.name: _tokens(run.heldout, common) for run in runs}),
    }
    for what in (REFERENCE, SAE, SAMPLING):
        why[what] = told_apart(what, {run.name: run.key[what] for run in runs})
    found = []
    for key, definition in {**METRICS, **ANSWER_METRICS}.items():
        reason = next((why[what] for what in depends_on(key) if why[what]), "")
        if reason:
            found.append(Refused(key, definition.label, reason))
    return found


def told_apart(what: str, values: Mapping[str, str]) -> str:
    """Who has which value, in words; empty where all have the same."""
    holders: dict[str, list[str]] = {}
    for name, value in values.items():
        holders.setdefault(value, []).append(name)
    if len(holders) == 1:
        return ""
    told = "; ".join(f"{', '.join(names)}: {value}" for value, names in holders.items())
    return f"they differ in the {what} ({told})"


def _differing_ids(
    runs: Sequence[Measured], what: str, ids: Callable[[Measured], Sequence[str]]
) -> str:
    first, *others = runs
    for other in others:
        told = _unequal(ids(first), ids(other), first.name, other.name)
        if told:
            return f"they differ in the {what} ({told})"
    return ""


def _unequal(
    wanted: Sequence[str], found: Sequence[str], first: str = "the first", second: str = "this"
) -> str:
    """In which ids two sets differ; empty where they are equal."""
    parts = []
    for name, here, there in ((first, wanted, found), (second, found, wanted)):
        only = sorted(set(here) - set(there))
        if only:
            parts.append(f"{len(only)} only in {name}: {_listed(only)}")
    return "; ".join(parts)


def _listed(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:SHOWN_IDS])
    return f"{shown}, ..." if len(ids) > SHOWN_IDS else shown


def _tokens(scores: HeldoutScores, pair_ids: Collection[str]) -> str:
    """One value for the lengths in tokens of these pairs' answers, whatever the pairs' order."""
    rows = zip(scores.pair_ids, scores.tokens.astype(int).tolist(), strict=True)
    counts = {pair_id: tokens for pair_id, tokens in rows if pair_id in pair_ids}
    total = sum(sum(tokens) for tokens in counts.values())
    text = json.dumps(counts, sort_keys=True).encode()
    return f"{total:,} tokens, {hashlib.sha256(text).hexdigest()[:8]}"
