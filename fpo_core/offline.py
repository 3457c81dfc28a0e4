"""The offline pass over one shard of pairs: reference log-probs, SAEs' features, or all at once.

Computing them together takes one forward pass; computing only features ends it after the deepest
SAE's layer and never touches the head. Either way the same batches go through the same layers, so
an artifact's bytes do not depend on what was computed beside it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.data.batches import PairBatch, PairIds, by_length, collate, that_fit
from fpo_core.data.prompt_rows import rows_of
from fpo_core.errors import FPOError
from fpo_core.features.tables import Columns, FeatureColumns, FeatureTables, ScoredTokens
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.budget import TokenBudget, is_out_of_memory
from fpo_core.models.forward import forward_pairs, prompt_cost, scored_activations
from fpo_core.progress import not_shown
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import ActiveFeatures, SparseCoder

log = logging.getLogger("fpo.stage")

NAMED = 3  # pairs, at most, that a message names


class WantedFeatures(NamedTuple):
    """An SAE whose cache is wanted, and what to keep in it."""

    coder: SparseCoder  # on the model's device
    hookpoint: Hookpoint
    settings: FeatureSettings
    pinned: tuple[int, ...] = ()  # features whose pooled values are kept whatever they are


class ShardScores(NamedTuple):
    """Columns of a shard's tables."""

    reference: Columns | None  # None where it was not asked for
    features: tuple[FeatureColumns, ...]  # in the order of the SAEs
    tokens: int  # that went through the model


class PassedShard(NamedTuple):
    """A shard that the model is done with, while its last batches are still being gathered."""

    reference: Columns | None
    tokens: int
    gatherer: "_Gatherer"

    def scores(self) -> ShardScores:
        """Its columns; waits for what is being gathered. From any thread, once."""
        return ShardScores(self.reference, self.gatherer.columns(), self.tokens)


def score_shard(
    model: Any,
    pairs: Sequence[PairIds],
    saes: Sequence[WantedFeatures],
    *,
    want_reference: bool,
    budget: TokenBudget,
) -> ShardScores:
    """Score the pairs of a shard, and wait for its columns: see ``pass_shard``."""
    return pass_shard(model, pairs, saes, want_reference=want_reference, budget=budget).scores()


@torch.no_grad()
def pass_shard(
    model: Any,
    pairs: Sequence[PairIds],
    saes: Sequence[WantedFeatures],
    *,
    want_reference: bool,
    budget: TokenBudget,
    on_tokens: Callable[[int], None] = not_shown,
) -> PassedShard:
    """Score the pairs of a shard with the frozen reference model.

    The features' tables are gathered in a thread, which may be at the last batches when this
    returns: a GPU need not wait for them before the next shard.

    Args:
        model: the reference.
        pairs: the shard's pairs, whose order the tables keep.
        saes: whose features are wanted.
        want_reference: whether log-probs are wanted.
        budget: tokens a forward pass; halved, once, when the memory does not suffice.
        on_tokens: told how many tokens were done after each batch.

    Raises:
        FPOError: a pair is longer than the budget or has a response without a scored token, memory
            is short of half of the budget too, or the model's numbers are not finite.
    """
    _check_responses(pairs)
    budget.check(pairs)
    rows = rows_of(pairs, prompt_cost(model))
    lengths = [row.ids.length for row in rows]
    logps = np.zeros(2 * len(pairs))
    tables = [FeatureTables(pairs, s.coder.d_sae, s.settings, s.pinned) for s in saes]
    todo, done = by_length(lengths), 0
    gatherer = _Gatherer(tables)
    with gatherer.closing():
        while todo:
            taken = that_fit(todo, lengths, budget.tokens)
            try:
                batch = collate([rows[row].ids for row in taken], device=str(model.device))
                scores, active = _pass(model, batch, saes, want_reference)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                budget.halve(error)
                continue
            responses = np.concatenate([rows[row].responses for row in taken])
            counts = batch.lengths.cpu().numpy()
            there = counts > 0  # a row of one response has no second
            if want_reference:
                logps[responses] = scores[there]
            tokens = ScoredTokens(
                responses=responses,
                lengths=counts[there],
                positions=batch.offsets.cpu().numpy(),
                targets=batch.targets.cpu().numpy(),
            )
            gatherer.add(tokens, active)
            todo, done = todo[len(taken) :], done + batch.num_tokens
            on_tokens(batch.num_tokens)
    reference = _reference_columns(pairs, logps.reshape(-1, 2)) if want_reference else None
    return PassedShard(reference, done, gatherer)


def _pass(
    model: Any, batch: PairBatch, saes: Sequence[WantedFeatures], want_reference: bool
) -> tuple[np.ndarray, list[ActiveFeatures]]:
    """Log-probs [R] where they are wanted, and what fires in each SAE."""
    hookpoints = [sae.hookpoint for sae in saes]
    logps = np.empty(0)
    if want_reference:
        out = forward_pairs(model, batch, hookpoints)
        _check_finite(out.logps, "log-probs", batch, torch.arange(len(batch.lengths)))
        logps, activations = out.logps.cpu().numpy(), out.activations
    else:
        activations = scored_activations(model, batch, hookpoints)
    for place, x in zip(hookpoints, activations, strict=True):
        _check_finite(x, f"activations at {place}", batch, batch.response)
    return logps, [sae.coder.active(x) for sae, x in zip(saes, activations, strict=True)]


def _check_responses(pairs: Sequence[PairIds]) -> None:
    for pair in pairs:
        if not len(pair.chosen) or not len(pair.rejected):
            raise FPOError(
                f"pair {pair.pair_id} has an empty response, which nothing can be measured on: "
                f"rerun from tokenize, which leaves such pairs out"
            )
        if not all(pair.scored):
            raise FPOError(
                f"pair {pair.pair_id} has a response without a scored token, which nothing can be "
                f"measured on: rerun from tokenize, which leaves such pairs out"
            )


def _check_finite(values: Tensor, what: str, batch: PairBatch, response: Tensor) -> None:
    """No feature fires at NaN: unchecked, the tables would say that there are none."""
    finite = values.isfinite()
    if finite.all():
        return
    bad = ~finite.flatten(1).all(1) if finite.ndim > 1 else ~finite
    rows = (response.to(bad.device)[bad] // 2).tolist()
    pairs = list(dict.fromkeys(batch.pair_ids[row] for row in rows))
    more = f" and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    raise FPOError(
        f"the model's {what} are not finite (NaN or infinite) in the pairs "
        f"{', '.join(pairs[:NAMED])}{more}: its weights are damaged, or it overflows. Set "
        f"model.dtype=float32 or model.attention=eager where that is not so, or fetch it again"
    )


class _Gatherer:
    """Fills the tables in a thread of its own, while the model is at the next batch."""

    def __init__(self, tables: Sequence[FeatureTables]) -> None:
        self._tables = tables
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="features")
        self._last: Future[None] | None = None

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Batches come in here, and none after; what an error leaves behind is waited for."""
        try:
            yield
        except BaseException:
            self._thread.shutdown(wait=True)
            raise
        self._thread.shutdown(wait=False)

    def add(self, tokens: ScoredTokens, active: Sequence[ActiveFeatures]) -> None:
        """Take in a batch; waits for the one before, so that no more than one is held."""
        self._finish()
        self._last = self._thread.submit(self._gather, tokens, active)

    def _gather(self, tokens: ScoredTokens, active: Sequence[ActiveFeatures]) -> None:
        for table, found in zip(self._tables, active, strict=True):
            table.add(tokens, found)

    def _finish(self) -> None:
        if self._last is not None:
            self._last.result()

    def columns(self) -> tuple[FeatureColumns, ...]:
        """Of each table, once all batches are in."""
        self._finish()
        return tuple(table.columns() for table in self._tables)


def _reference_columns(pairs: Sequence[PairIds], logps: np.ndarray) -> Columns:
    scored = np.array([pair.scored for pair in pairs], dtype=np.int32).reshape(-1, 2)
    return {
        "pair_id": [pair.pair_id for pair in pairs],
        "chosen_logp": logps[:, 0],
        "rejected_logp": logps[:, 1],
        "chosen_tokens": scored[:, 0],
        "rejected_tokens": scored[:, 1],
    }
