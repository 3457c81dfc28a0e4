"""Renders a comparison: ``compare.html``, its figures as PNG, tables as LaTeX, data as Parquet."""

import io
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from fpo_core.report import palette, view
from fpo_core.report.comparison import ComparedMetric, ComparisonReport
from fpo_core.report.comparison_charts import Drawn, Style, draw
from fpo_core.report.comparison_tables import Table, differences, metric_rows, tables
from fpo_core.report.findings import excludes_zero, with_unit
from fpo_core.report.latex import latex
from fpo_core.report.model import Interval
from fpo_core.report.page import environment, replace_file
from fpo_core.report.scores import why_apart

TEMPLATE = "compare.html.j2"
PAGE = "compare.html"
FOLDERS = {"figures": ".png", "tables": ".tex", "data": ".parquet"}


def render_comparison(report: ComparisonReport, out_dir: Path) -> Path:
    """Write a comparison.

    Args:
        report: the runs.
        out_dir: folder that receives ``compare.html``, ``figures/``, ``tables/`` and ``data/``;
            made where missing. What an earlier comparison wrote there by our names is removed.

    Returns:
        The HTML file.
    """
    drawn = draw(report)
    every, pairwise = tables(report), differences(report)
    html = _page(report, drawn, every, pairwise)
    files: dict[str, bytes] = {}
    for drawing in drawn.every():
        files[f"figures/{drawing.figure.name}.png"] = drawing.figure.png
        files[f"data/figure_{drawing.figure.name}.parquet"] = _parquet(drawing.data)
    for table in (*every, *pairwise):
        files[f"tables/{table.name}.tex"] = latex(table).encode()
        files[f"data/table_{table.name}.parquet"] = _parquet(table.data)
    for folder, suffix in FOLDERS.items():
        place = out_dir / folder
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob(f"*{suffix}"):
            if f"{folder}/{old.name}" not in files and _is_ours(old.stem):
                old.unlink()
    for name, content in files.items():
        replace_file(out_dir / name, content)
    page = out_dir / PAGE
    replace_file(page, html.encode())
    return page


def headline(report: ComparisonReport) -> str:
    """Which run is ahead in accuracy, and of which others clearly so."""
    count = f"{len(report.runs)} runs"
    metric = next((m for m in report.metrics if m.key == "accuracy"), None)
    if metric is None:
        return f"{count}, which cannot be compared in their held-out accuracy."
    values = [one.value for one in metric.runs]
    best = values.index(max(values))
    also = [
        run.name for run, value in zip(report.runs, values, strict=True) if value == max(values)
    ]
    clear, unclear = [], []
    for place, run in enumerate(report.runs):
        if run.name not in also:
            (clear if excludes_zero(_lead(metric, best, place)) else unclear).append(run.name)
    verb = "has" if len(also) == 1 else "share"
    value = with_unit(values[best], "share", 3)
    text = f"{_listed(also)} {verb} the highest held-out accuracy, {value}"
    if clear:
        text += f", clearly above {_listed(clear)}"
    if unclear:
        text += f"{'; not' if clear else ', but not'} clearly above {_listed(unclear)}"
    return f"{text}."


def _lead(metric: ComparedMetric, run: int, over: int) -> Interval:
    """A run's lead over another; the differences hold each two runs once."""
    for found in metric.differences:
        if (found.run, found.minus) == (run, over):
            return found.interval
        if (found.run, found.minus) == (over, run):
            one = found.interval
            return Interval(-one.value, -one.high, -one.low)
    raise AssertionError("every two runs have a difference")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _page(
    report: ComparisonReport, drawn: Drawn, every: Sequence[Table], pairwise: Sequence[Table]
) -> str:
    reasons: dict[str, list[str]] = {}
    for label, reason in report.refused:
        reasons.setdefault(reason, []).append(label)
    count = len(report.runs)
    pairs = [(run, minus) for minus in range(count) for run in range(minus + 1, count)]
    views = [[view.metric_view(row) for row in metric_rows(report, *pair)] for pair in pairs]
    return environment().get_template(TEMPLATE).render(
        report=report,
        headline=headline(report),
        drawn=drawn,
        results=[t for t in every if t.name in ("accuracy_entropy", "metrics")],
        scores=[t for t in every if t.name.startswith("scores_")],
        cost=next(t for t in every if t.name == "cost"),
        differences=list(zip(pairwise, views, strict=True)),
        apart=why_apart(report.scores),
        refused=list(reasons.items()),
        tags=Style([run.name for run in report.runs]).tags,
        tones=palette.RUNS,
        created=view.created_text,
        dark_rules=palette.dark_rules(),
    )  # fmt: skip


def _parquet(frame: pl.DataFrame) -> bytes:
    written = io.BytesIO()
    frame.write_parquet(written)
    return written.getvalue()


def _is_ours(stem: str) -> bool:
    """Whether a comparison writes files of this name; other people's files are left alone."""
    starts = ("accuracy_entropy", "metrics", "cost", "scores_", "difference_", "win_rate_", "kl_",
              "discrepancy_", "figure_", "table_")  # fmt: skip
    return stem.startswith(starts)
