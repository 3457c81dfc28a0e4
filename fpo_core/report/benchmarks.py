"""The benchmarks of one run's report: a table a contest, a row a figure."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from fpo_core.report.comparison_tables import Table, key_text, score_value
from fpo_core.report.scores import SCORE_FIELDS, contest, score_tables
from fpo_core.report.view import Value


def contest_table(record: Mapping[str, Any]) -> Table:
    """The figures of a record of ``scores.json``, with what a reader has to know of them."""
    (found,) = score_tables({"policy": [record]})
    (row,) = found.rows
    rows = []
    for name, cell in row.cells.items():
        label, unit = found.columns[name]
        shown = f"{label} ({unit})" if unit not in ("", "%", "share") else label
        rows.append(
            (Value(shown, ""), score_value(cell, unit), Value(f"{cell.judged} of {cell.asked}", ""))
        )
    note = " ".join((*record.get("notes", ()), f"Key of these figures: {key_text(found.key)}."))
    own = found.temperature is None
    at = "the benchmark's own temperatures" if own else f"temperature {found.temperature:g}"
    title = f"{contest(found.benchmark, found.opponent)}, {at}"
    columns = ("Figure", "Policy", "Judged of asked")
    data = pl.DataFrame([{n: score[n] for n in SCORE_FIELDS} for score in record["scores"]])
    return Table("", title, columns, 1, tuple(rows), note, data)
