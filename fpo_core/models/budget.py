"""How many tokens a model takes at a time, without a gradient: found, checked, halved."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from fpo_core.data.batches import PairIds, collate
from fpo_core.errors import FPOError
from fpo_core.models.forward import scored_hidden

log = logging.getLogger("fpo.stage")

SETTING = "resources.inference.tokens_per_batch"
# Two cores are busy with this many; more only take memory.
CPU_TOKENS = 2048
# A GPU is busy with this many, whatever memory it has left.
GPU_TOKENS = 65_536
# Of the free memory: the SAE's chunks, the head's, and what the allocator cannot use take theirs.
USABLE = 0.5


class TokenBudget:
    """Tokens a forward pass, padding included; or tokens held by answers that are generated.

    Args:
        tokens: the budget.
        given: whether the recipe says so, and no pair is to exceed it; beyond one that was found,
            or that was halved, a longer pair goes alone.
        of: what takes so many tokens, for messages.
        setting: of the recipe, that gives it.
        longest: setting of the longest that there is.
    """

    def __init__(
        self,
        tokens: int,
        *,
        given: bool = True,
        of: str = "a forward pass",
        setting: str = SETTING,
        longest: str = "data.max_length",
    ) -> None:
        self.tokens, self._given = tokens, tokens if given else None
        self._of, self._setting, self._longest = of, setting, longest
        self._halved = False

    def check(self, pairs: Sequence[PairIds]) -> None:
        """Refuse pairs that do not fit what the recipe gives.

        Raises:
            FPOError: naming the longest pair.
        """
        longest = max(pairs, key=lambda pair: pair.length)
        if self._given is not None and longest.length > self._given:
            raise FPOError(
                f"{SETTING}={self._given} is too small for pair {longest.pair_id}, which has "
                f"{longest.length} tokens (prompt and both responses); set it to {longest.length} "
                f"or more, or to `auto`"
            )

    def halve(self, error: BaseException) -> None:
        """Go on with half of it, after a pass that ran out of memory.

        Raises:
            FPOError: that was tried already.
        """
        if self._halved:
            raise FPOError(
                f"out of memory with {self.tokens} tokens {self._of}, half of what was tried "
                f"first; lower {self._setting} further, or {self._longest}"
            ) from error
        self._halved, self.tokens = True, max(1, self.tokens // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.warning(
            "out of memory: going on with half the tokens %s, %d (%s)",
            self._of, self.tokens, self._setting,
        )  # fmt: skip


def token_budget(model: Any, setting: int | Literal["auto"], longest: int) -> TokenBudget:
    """The budget that a recipe gives, or one that is found.

    On a GPU two passes with rows of the longest pair's length tell what a token takes.

    Args:
        model: on its device.
        setting: the recipe's.
        longest: tokens of the longest pair to expect.
    """
    if setting != "auto":
        return TokenBudget(setting)
    tokens = CPU_TOKENS
    if model.device.type == "cuda":
        one, two = (_peak_bytes(model, longest, rows) for rows in (1, 2))
        free, _ = torch.cuda.mem_get_info(model.device)
        tokens = affordable_tokens(free, (two - one) / longest)
        log.info("tokens a forward pass: %d (%.0f kB each, %.1f GB free)",
                 tokens, (two - one) / longest / 1e3, free / 1e9)  # fmt: skip
    return TokenBudget(tokens, given=False)


def affordable_tokens(free: float, per_token: float, most: int = GPU_TOKENS) -> int:
    """Tokens that half of the free bytes hold: a multiple of 1,024, no more than a GPU needs."""
    fitting = int(USABLE * free / max(per_token, 1.0))
    return max(1024, min(most, fitting) // 1024 * 1024)


@torch.no_grad()
def _peak_bytes(model: Any, length: int, rows: int) -> int:
    """What a pass takes at its peak, beyond what is there before."""
    third = max(1, length // 3)
    pair = PairIds("", [0] * max(1, length - 2 * third), [0] * third, [0] * third)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    scored_hidden(model, collate([pair] * rows, device=str(model.device)))
    return torch.cuda.max_memory_allocated(model.device) - before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is torch's, or the system's, way to say that memory is short."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        said in str(error) for said in ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
