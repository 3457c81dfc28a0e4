"""How ``fpo plan`` shows what a run would cost."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cli.show import new_table
from tasks.estimate import Estimate, Estimates
from tasks.run import human_bytes
from tasks.sweep import CellEstimates

if TYPE_CHECKING:  # this imports Prefect, which takes seconds
    from tasks.judging_cost import JudgingCost


def print_estimates(estimates: Estimates) -> None:
    """A line a stage, and what the figures rest on."""
    if not estimates.stages:
        return
    console = Console()
    console.print("estimates of what is missing:", highlight=False)
    table: Table = new_table("stage", "tokens", "size", "FLOPs", "time")
    for stage in estimates.stages:
        table.add_row(
            stage.stage, _count(stage.tokens), human_bytes(int(stage.bytes)) if stage.bytes else "",
            f"{stage.flops:.1e}" if stage.flops else "", _time(stage),
        )  # fmt: skip
    hours = estimates.h100_hours
    table.add_row(
        "together", "", human_bytes(int(estimates.bytes)), "",
        _h100(3600 * hours) if hours else "",
    )  # fmt: skip
    console.print(table)
    for line in estimates.rests_on:
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def print_cell_estimates(cells: Sequence[CellEstimates]) -> None:
    """A line a cell of a sweep: what it adds to those before it."""
    table: Table = new_table("cell", "stages", "size", "time")
    total, stored, lines = 0.0, 0.0, {}
    for cell, stages, estimates in cells:
        seconds = sum(stage.seconds or 0.0 for stage in estimates.stages)
        on_h100 = bool(estimates.h100_hours)
        total, stored = total + seconds, stored + estimates.bytes
        lines |= dict.fromkeys(estimates.rests_on)
        time = _h100(seconds) if on_h100 else _duration(seconds)
        size = human_bytes(int(estimates.bytes)) if estimates.bytes else ""
        table.add_row(cell, str(len(stages)), size, time if seconds else "")
    table.add_row("together", "", human_bytes(int(stored)), _duration(total) if total else "")
    console = Console()
    console.print(table)
    for line in lines:
        console.print(f"- {line}", highlight=False, soft_wrap=True)


def print_judging(costs: "Sequence[JudgingCost]") -> None:
    """A line a benchmark: what a judge would be asked, and what that costs at most."""
    console = Console()
    table: Table = new_table(
        "benchmark", "answers", "verdicts", "to ask", "prompts", "replies", "USD"
    )
    for name, cost, answers in costs:
        table.add_row(
            name, answers, f"{cost.asked:,}", f"{cost.left:,}", f"{cost.prompt_tokens:,}",
            f"{cost.most_reply_tokens:,}", "" if cost.usd is None else f"{cost.usd:,.2f}",
        )  # fmt: skip
    console.print(table)
    estimates = [cost.estimate for cost in costs]
    console.print(
        f"- at most: tokens of prompts and of the longest replies, by {estimates[0].counted_by}",
        highlight=False,
    )
    if any(answers == "longest" for *_, answers in costs):
        console.print("- answers that are not there yet: as long as they may be", highlight=False)
    if any(estimate.usd is None for estimate in estimates):
        console.print(
            "- judge.price.prompt and judge.price.reply, USD a million tokens, give the price",
            highlight=False,
        )


def _time(stage: Estimate) -> str:
    if stage.seconds is None:
        return f"in the pass of {stage.time_from}" if stage.time_from else ""
    if stage.time_from == "H100":
        return _h100(stage.seconds)
    return f"{_duration(stage.seconds)}, as {stage.time_from} ran"


def _count(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f}"


def _h100(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 0.01:
        return f"{seconds:.1g} H100-seconds"
    return f"{hours:,.0f} H100-hours" if hours >= 10 else f"{hours:.2g} H100-hours"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
