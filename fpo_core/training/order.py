"""The order that examples are trained in: a pure function of the counts, the settings and the seed.

An epoch draws windows of shards in a random order and the rows of a window at random, so that a
reader never holds more than two windows. Rows are drawn in groups of several batches; ``stream.py``
deals a group's rows into batches by length.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fpo_core.recipe.training import OptimizerSettings


class Group(NamedTuple):
    """Rows that are drawn together, and the batches they make."""

    rows: list[tuple[int, int]]  # (shard, row of the split)
    first_step: int  # optimizer step of the group's first batch, from 1
    seed: tuple[int, int, int]  # of the order of its batches: the run's, epoch, group


def groups(counts: Sequence[int], settings: OptimizerSettings) -> Iterator[Group]:
    """Every group of a run, in order.

    Args:
        counts: rows of each shard.
        settings: batch size, epochs, seed, window and batches a group.
    """
    size = settings.batch_size * settings.bucket_batches
    for epoch in range(settings.epochs):
        before = epoch * num_steps(sum(counts), settings.batch_size, 1)
        rows = epoch_rows(counts, settings.window_shards, settings.seed, epoch)
        for number, start in enumerate(range(0, len(rows), size)):
            drawn = [(int(shard), int(row)) for shard, row in rows[start : start + size]]
            first = before + number * settings.bucket_batches + 1
            yield Group(drawn, first, (settings.seed, epoch, number))


def epoch_rows(counts: Sequence[int], window: int, seed: int, epoch: int) -> np.ndarray:
    """All rows [n, 2] of an epoch as (shard, row), shuffled within windows of shards.

    Args:
        counts: rows of each shard.
        window: shards that are shuffled together.
        seed: of the run.
        epoch: from 0.
    """
    random = np.random.default_rng([seed, epoch])
    rows = [np.stack([np.full(n, s), np.arange(n)], axis=1) for s, n in enumerate(counts)]
    shards = np.arange(len(counts))
    if len(counts) > window:
        shards = random.permutation(shards)
    windows = [
        np.concatenate([rows[shard] for shard in shards[start : start + window]])
        for start in range(0, len(shards), window)
    ]
    return np.concatenate([every[random.permutation(len(every))] for every in windows])


def batches_of(group: Group, lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The batches of a group, as places among its rows: alike in length, in random order.

    A smaller one, which an epoch's last group may have, comes last. A group of one batch keeps its
    order.
    """
    places = np.arange(len(lengths))
    if len(lengths) > batch_size:
        places = np.argsort(-np.asarray(lengths), kind="stable")
    batches = [places[i : i + batch_size].tolist() for i in range(0, len(places), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    order = np.random.default_rng(group.seed).permutation(len(full))
    return [full[number] for number in order] + batches[len(full) :]


def num_steps(num_examples: int, batch_size: int, epochs: int) -> int:
    """Optimizer steps of a run; an epoch's last batch may be smaller."""
    return epochs * -(-num_examples // batch_size)
