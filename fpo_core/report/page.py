"""Renders a report to ``report.html`` and ``charts/*.png``.

The page needs nothing but itself: styles and drawings are inline, there is no script, and a
content security policy forbids both scripts and every network request, so that text from data
stays text even if an escape were missed.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fpo_core.files import follow_umask
from fpo_core.report import palette, view
from fpo_core.report.benchmarks import contest_table
from fpo_core.report.breakdown import FIGURE_NAMES, Section, sections
from fpo_core.report.charts import CHART_NAMES, Drawn, Figure, draw
from fpo_core.report.data import LENGTHS, DataSection, data_section
from fpo_core.report.findings import headline
from fpo_core.report.heldout import heldout_figures
from fpo_core.report.human import printable
from fpo_core.report.model import RunReport

TEMPLATE = "template.html.j2"


def render(report: RunReport, out_dir: Path) -> Path:
    """Write a report.

    Args:
        report: the run.
        out_dir: folder that receives ``report.html`` and ``charts/*.png``; made where missing.
            Charts of an earlier report in it that this run has no data for are removed.

    Returns:
        The HTML file.
    """
    drawn = draw(report)
    watched = heldout_figures(report.heldout)
    groups = sections(report)
    data = data_section(report.data)
    html = _page(report, drawn, watched, groups, data)
    charts = out_dir / "charts"
    charts.mkdir(parents=True, exist_ok=True)
    by_group = [section.figure for section in groups if section.figure]
    lengths = [data.figure] if data and data.figure else []
    every = (*drawn.curves, *drawn.features, *watched, *by_group, *lengths)
    figures = {figure.name: figure.png for figure in every}
    earlier = [path.stem for path in charts.glob(f"{FIGURE_NAMES}*.png")]
    for name in dict.fromkeys((*CHART_NAMES, LENGTHS, *earlier, *figures)):
        path = charts / f"{name}.png"
        if name in figures:
            replace_file(path, figures[name])
        else:
            path.unlink(missing_ok=True)
    page = out_dir / "report.html"
    replace_file(page, html.encode())
    return page


def _page(
    report: RunReport,
    drawn: Drawn,
    watched: tuple[Figure, ...],
    groups: tuple[Section, ...],
    data: DataSection | None,
) -> str:
    clear, compared = view.clear_changes(report)
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            report=report,
            drawn=drawn,
            watched=watched,
            headline=headline(report),
            created=view.created_text(report.created),
            benchmarks=[contest_table(record) for record in report.benchmarks],
            breakdown=groups,
            data=data,
            metrics=[view.metric_view(metric) for metric in report.metrics],
            clear=clear,
            compared=compared,
            facts=view.training_facts(report),
            features=view.feature_views(report.features),
            groups=view.group_views(report.groups),
            open_samples=view.OPEN_SAMPLES,
            stops=view.STOPS,
            stages=view.stage_views(report.stages),
            totals=view.totals(report.stages),
            dark_rules=palette.dark_rules(),
        )
    )


def environment() -> Environment:
    """Where pages are rendered: all text is escaped, a name that is missing is an error."""
    made = Environment(
        loader=PackageLoader("fpo_core.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["ours"] = Markup  # drawings and rules made here, never text from data
    return made


def _printable(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    return value


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader never sees half of one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        follow_umask(temporary)  # mkstemp makes it private, and a report is passed on
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
