"""A batch whose loss is not finite, kept for whoever looks for the reason."""

import math
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from fpo_core.data.pair_shard import SIDES
from fpo_core.errors import FPOError
from fpo_core.training.examples import Example
from fpo_core.training.loss import BatchLoss


def keep_bad_batch(
    file: Path, step: int, examples: Sequence[Example], loss: BatchLoss
) -> FPOError:  # fmt: skip
    """Write what went into a loss and what came out of it, one row a response.

    Returns:
        The error to raise, which names the step, the pairs and the file.
    """
    losses, u = loss.objective.losses.tolist(), loss.objective.u.tolist()
    responses = {
        "policy_logp": loss.policy_logps.tolist(),
        "reference_logp": [logp for example in examples for logp in example.logps],
        "discrepancy": loss.discrepancy.tolist(),
        "kl": loss.kl.tolist(),
    }
    rows = [
        {
            "step": step,
            "pair_id": example.ids.pair_id,
            "side": side,
            "prompt_ids": list(example.ids.prompt),
            "response_ids": list(ids),
            "unscored": [int(end) for end in example.ids.unscored[number]],
            **{name: values[2 * pair + number] for name, values in responses.items()},
            "u": u[pair],
            "loss": losses[pair],
        }
        for pair, example in enumerate(examples)
        for number, (side, ids) in enumerate(
            zip(SIDES, (example.ids.chosen, example.ids.rejected), strict=True)
        )
    ]
    # Of empty lists alone polars would not know the type.
    types = {"unscored": pl.List(pl.Int32)}
    pl.DataFrame(rows, schema_overrides=types).write_parquet(file)
    bad = [
        f"{example.ids.pair_id} ({value})"
        for example, value in zip(examples, losses, strict=True)
        if not math.isfinite(value)
    ]
    return FPOError(
        f"step {step}: the loss is not finite for pair {', '.join(bad)}. The batch is kept in "
        f"{file.name}; if it grew over several steps, lower train.lr or train.max_grad_norm"
    )
