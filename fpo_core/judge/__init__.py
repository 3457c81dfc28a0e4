"""Asking a judge: any OpenAI-compatible endpoint, every reply kept by the content it answers."""

from fpo_core.judge.cache import JudgmentCache
from fpo_core.judge.client import Counts, Judge, Judged
from fpo_core.judge.cost import Estimate, estimate_cost
from fpo_core.judge.endpoint import check_judge

__all__ = [
    "Counts", "Estimate", "Judge", "Judged", "JudgmentCache", "check_judge", "estimate_cost",
]  # fmt: skip
