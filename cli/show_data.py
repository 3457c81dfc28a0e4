"""Tables of ``fpo data`` and of the data in ``fpo plan``."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from explorer.text import visible
from fpo_core.data.conversations.fields import NOTES
from fpo_core.data.conversations.reader import PASSED_OVER
from tasks.data_check import DataCheck, PlannedSource, ShownExample

_LONGEST = 1200  # characters of a prompt or an answer that are shown
_BAR = 30  # characters of the longest bar
_SIDES = (("chosen", "green"), ("rejected", "red"))


def print_check(found: DataCheck) -> None:
    """Print what was found in a section of a recipe."""
    console = Console()
    console.print(Text(f"{found.section}: {_pairs(found.stats)}", style="bold"))
    _print_sources(console, found.stats["sources"])
    for note, count in found.stats["notes"].items():
        console.print(Text(f"note  {count:,} x {NOTES[note]}"))
    _print_drops(console, found)
    _print_lengths(console, found)
    for number, example in enumerate(found.examples, start=1):
        _print_example(console, number, example)
    if found.error:
        console.print()
        console.print(Text(f"A run would stop: {_safe(found.error)}", style="bold red"))


def planned_lines(sources: Sequence[PlannedSource]) -> Iterator[str]:
    """Yield a line per source for a plan, and what to look at next."""
    for source in sources:
        rows = f"first {source.rows:,} rows" if source.is_sample else _rows(source.rows)
        parts = [f"{source.section}, {source.split}: {visible(source.source)}: {rows}"]
        if source.shapes:
            parts.append(f"read as {visible(source.shapes[0])}")
        if len(source.shapes) > 1:
            parts.append(f"and {len(source.shapes) - 1} more shapes")
        if source.unused:
            parts.append(f"not used: {visible(', '.join(source.unused))}")
        if source.dropped:
            parts.append(f"{source.dropped:,} dropped")
        yield ", ".join(parts)


def _rows(count: int) -> str:
    return f"{count:,} row" + "s" * (count != 1)


def _pairs(stats: dict[str, Any]) -> str:
    told = ", ".join(f"{count:,} {split}" for split, count in stats["pairs"].items() if count)
    dropped = sum(stats["dropped"].values())
    return f"{told or 'no'} examples" + (f", {dropped:,} dropped" if dropped else "")


def _print_sources(console: Console, sources: list[dict[str, Any]]) -> None:
    for source in sources:
        rows = _rows(source["rows"])
        console.print(Text(f"\n{source['split']}  {visible(source['source'])}  {rows}"))
        for columns, count in source["shapes"].items():
            console.print(Text(f"  {count:,} read from  {visible(columns)}"))
        for why, count in source["passed_over"].items():
            console.print(Text(f"  {count:,} {PASSED_OVER[why]}"))
        unused = source["unused_columns"]
        if unused:
            told = ", ".join(f"{visible(name)} ({count:,})" for name, count in unused.items())
            console.print(Text(f"  not used    {told}", style="yellow"))


def _print_drops(console: Console, found: DataCheck) -> None:
    if not found.drops:
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("dropped", justify="right")
    table.add_column("reason, first row, remedy", overflow="fold")
    for drop in found.drops:
        told = Text(drop.text, style="yellow" if drop.is_bad else "")
        told.append(f"\nfirst: {visible(drop.first, _LONGEST)}", style="dim")
        if drop.remedy:
            told.append(f"\n{drop.remedy}", style="dim")
        table.add_row(f"{drop.rows:,}", told)
    console.print(table)


def _print_lengths(console: Console, found: DataCheck) -> None:
    """Print the histogram of prompt + longest answer, before and after what did not fit."""
    before, after = (found.stats["lengths"][name] for name in ("before", "after"))
    if not before["examples"]:
        return
    table = Table(
        title="tokens of the prompt with its longest answer",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("up to", justify="right")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("")
    most = max(*before["histogram"], *after["histogram"])
    labels = [*(f"{edge:,}" for edge in found.edges), "more"]
    for label, was, now in zip(labels, before["histogram"], after["histogram"], strict=True):
        if was or now:
            bar = Text("█" * round(now / most * _BAR), style="green")
            bar.append("░" * round(max(was - now, 0) / most * _BAR), style="dim")
            table.add_row(label, f"{was:,}", f"{now:,}", bar)
    console.print(table)
    told = (
        f"mean tokens: prompt {_mean(before, 'prompt')} -> {_mean(after, 'prompt')}, "
        f"answer {_mean(before, 'answer')} -> {_mean(after, 'answer')}"
    )
    console.print(Text(told))


def _mean(lengths: dict[str, Any], what: str) -> str:
    value = lengths[f"mean_{what}"]
    return "none" if value is None else f"{value:,.1f}"


def _print_example(console: Console, number: int, example: ShownExample) -> None:
    console.print()
    console.print(Text(f"example {number}, {example.split}: {visible(example.where)}", "bold"))
    console.print(Text(_safe(_tail(example.prompt)), style="dim"))
    for side, (name, colour) in zip(example.sides, _SIDES, strict=False):
        shown = Text(f"{name}  ", style="bold")
        for text, scored in side.pieces:
            # Marked with brackets, too, where colours do not show.
            part = _safe(_head(text))
            shown.append(f"⟦{part}⟧" if scored else part, style=colour if scored else "dim")
        console.print(shown)


def _tail(text: str) -> str:
    return text if len(text) <= _LONGEST else f"… {text[-_LONGEST:]}"


def _head(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _safe(text: str) -> str:
    """Return a text of several lines with every other control character shown."""
    return "\n".join(visible(line, _LONGEST * 2) for line in text.split("\n"))
