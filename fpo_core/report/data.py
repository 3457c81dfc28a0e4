"""The data section of a report: what was read, what was left out, and how long the texts are."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import altair as alt
import polars as pl

from fpo_core.data.conversations.fields import NOTES
from fpo_core.data.conversations.reader import PASSED_OVER
from fpo_core.data.drops import REASONS
from fpo_core.data.lengths import EDGES
from fpo_core.report import palette
from fpo_core.report.charts import Figure, figure
from fpo_core.report.comparison_tables import Table
from fpo_core.report.view import Value

LENGTHS = "data_lengths"
TITLE = "Tokens of the prompt with its longest answer"
BIN_HEIGHT, AROUND = 18, 110  # pixels of a bin, and of the title and the axis

Stats = Mapping[str, Any]


class DataSection(NamedTuple):
    """The section, ready for the page."""

    summary: str
    sources: Table
    left_out: Table | None  # None: every row became an example, unchanged
    figure: Figure | None


def data_section(stats: Stats) -> DataSection | None:
    """Return the section for the statistics of a `pairs` artifact.

    None for artifacts of earlier versions, which say nothing of their sources.
    """
    if not stats.get("sources"):
        return None
    return DataSection(
        summary=_summary(stats),
        sources=_sources(stats),
        left_out=_left_out(stats),
        figure=_figure(stats["lengths"]),
    )


def _summary(stats: Stats) -> str:
    pairs = ", ".join(f"{count:,} {split}" for split, count in stats["pairs"].items())
    dropped = sum(stats["dropped"].values())
    before, after = (stats["lengths"][name] for name in ("before", "after"))
    told = f"{pairs} pairs. Left out: {dropped:,}."
    if before["mean_answer"] != after["mean_answer"]:
        told += (
            f" What did not fit changed the mean answer from {before['mean_answer']:,.0f} to "
            f"{after['mean_answer']:,.0f} tokens."
        )
    return told


def _sources(stats: Stats) -> Table:
    rows = [
        (
            one["source"],
            one["split"],
            " | ".join(one["shapes"]),
            ", ".join(one["unused_columns"]) or "–",
            f"{one['rows']:,}",
        )
        for one in stats["sources"]
    ]
    columns = ("Source", "Split", "Read from the columns", "Not used", "Rows")
    note = "Several shapes of rows in one source are set apart by a bar."
    return _table("Sources", columns, 4, rows, note)


def _left_out(stats: Stats) -> Table | None:
    rows = [
        (REASONS[reason].text if reason in REASONS else reason, "left out", f"{count:,}")
        for reason, count in stats["dropped"].items()
    ]
    for source in stats["sources"]:
        where = f" ({source['source']}, {source['split']})"
        rows += [
            (PASSED_OVER[why] + where, "left out", f"{count:,}")
            for why, count in source["passed_over"].items()
        ]
    rows += [(NOTES[note], "kept", f"{count:,}") for note, count in stats["notes"].items()]
    if not rows:
        return None
    note = "dropped.jsonl of the `pairs` artifact lists every row that was left out."
    return _table("Rows left out or changed", ("What", "Rows were", "Rows"), 2, rows, note)


def _table(
    title: str, columns: tuple[str, ...], names: int, rows: list[tuple[str, ...]], note: str
) -> Table:
    return Table(
        name="",
        title=title,
        columns=columns,
        names=names,
        rows=tuple(tuple(Value(cell, "") for cell in row) for row in rows),
        note=note,
        data=pl.DataFrame(),
    )


def _figure(lengths: Stats) -> Figure | None:
    """Draw the histogram: all rows that were tokenized, and of these the ones that are kept."""
    was, now = lengths["before"]["histogram"], lengths["after"]["histogram"]
    if not any(was):
        return None
    labels = [*(f"{edge:,}" for edge in EDGES), "more"]
    used = [place for place in range(len(labels)) if was[place] or now[place]]
    shown = range(used[0], used[-1] + 1)
    frame = pl.DataFrame(
        {
            "bin": [labels[place] for place in shown],
            "all": [was[place] for place in shown],
            "kept": [now[place] for place in shown],
        }
    )
    order = frame["bin"].to_list()
    place = alt.Y("bin:N", sort=order, title="up to, tokens")
    scale = alt.X("all:Q", title="examples")
    base = alt.Chart(alt.Data(values=frame.to_dicts()))
    every = base.mark_bar(
        fill=palette.SURFACE.light, stroke=palette.CURVE.light, strokeWidth=1
    ).encode(x=scale, y=place)
    kept = base.mark_bar(fill=palette.CHOSEN.light).encode(x=alt.X("kept:Q"), y=place)
    chart = alt.layer(every, kept).properties(
        width=palette.WIDTH, height=BIN_HEIGHT * len(order) + AROUND, title=TITLE
    )
    caption = "Outlined: all examples that were tokenized. Filled: the ones that are kept."
    return figure(LENGTHS, chart, TITLE, caption)
