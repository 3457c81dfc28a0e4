"""A pair as rows of a pass without gradient: its prompt once for both responses, where that pays.

Two responses behind one prompt save the prompt's tokens once; but with a mask each row of attention
reaches over the other response too, which is computed all the same. Short prompts with long
responses are better off as two rows then.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fpo_core.data.batches import PairIds


class PromptCost(NamedTuple):
    """Operations of one decoder block."""

    token: float  # a token's, but for attention
    attention: float  # of a query and a key; 0 where nothing is computed that a mask would hide


class Row(NamedTuple):
    """One row of a batch, and whose it is."""

    ids: PairIds
    responses: np.ndarray  # the shard's numbers of its responses: 2i chosen, 2i + 1 rejected


def rows_of(pairs: Sequence[PairIds], cost: PromptCost) -> list[Row]:
    """Each pair as one row, or as two."""
    rows = []
    for number, pair in enumerate(pairs):
        chosen, rejected = 2 * number, 2 * number + 1
        if one_row_pays(pair, cost):
            rows.append(Row(pair, np.array([chosen, rejected])))
        else:
            rows.append(Row(_alone(pair, 0), np.array([chosen])))
            rows.append(Row(_alone(pair, 1), np.array([rejected])))
    return rows


def _alone(pair: PairIds, side: int) -> PairIds:
    """Return the pair with one of its responses, as the chosen one."""
    response = (pair.chosen, pair.rejected)[side]
    return pair._replace(chosen=response, rejected=(), unscored=(pair.unscored[side], ()))


def one_row_pays(pair: PairIds, cost: PromptCost) -> bool:
    """Whether the prompt's tokens cost more than the attention between the two responses."""
    prompt, chosen, rejected = len(pair.prompt), len(pair.chosen), len(pair.rejected)
    together = (prompt + chosen + rejected) ** 2
    apart = (prompt + chosen) ** 2 + (prompt + rejected) ** 2
    return prompt * cost.token >= (together - apart) * cost.attention
