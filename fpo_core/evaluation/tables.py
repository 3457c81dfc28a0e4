"""The evaluation's tables read back: what was measured on each pair and each prompt.

The stage writes ``pairs.parquet`` and ``answers.parquet``; every metric of ``metrics.json`` is a
mean over their rows, so a comparison of two policies starts from them and not from the means.
"""

import numpy as np
import polars as pl

from fpo_core.evaluation.audit import SIDES, MomentSums
from fpo_core.evaluation.heldout import BY_PAIR, HeldoutScores
from fpo_core.evaluation.metrics import Answered


def read_heldout(pairs: pl.DataFrame) -> HeldoutScores:
    """The scores of ``pairs.parquet``; it has no features, which are none here.

    Args:
        pairs: a row a held-out pair, with each quantity's ``_chosen`` and ``_rejected``.
    """
    found = {
        name: pairs.select(f"{name}_{side}" for side in SIDES).to_numpy().astype(np.float64)
        for name in BY_PAIR
    }
    none = MomentSums(0).moments()
    return HeldoutScores(pairs["pair_id"].to_list(), **found, features=none, groups=none)


def read_answered(answers: pl.DataFrame) -> Answered:
    """The per-prompt quantities of ``answers.parquet``; of no prompt where it is empty.

    Args:
        answers: a row a prompt, ``before`` being the reference's answer, ``after`` the policy's.
    """
    if not answers.height:
        return Answered([], *(np.zeros(0) for _ in Answered._fields[1:]))
    columns = ("after_entropy", "before_entropy", "after_tokens", "before_tokens")
    values = (answers[name].to_numpy().astype(np.float64) for name in columns)
    return Answered(answers["pair_id"].to_list(), *values)
