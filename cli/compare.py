"""``fpo compare``: finished runs against each other."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from cli.store import AsJson, StoreUrl
from storage.location import open_store, store_url

DEFAULT_FOLDER = Path("reports") / "compare"


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Each a recipe (its newest evaluation), evaluation/VERSION, policy/VERSION, or "
            "the id of a run; the start of an id or version is enough.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the page, figures and tables.")
    ] = DEFAULT_FOLDER,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Compare finished runs: tables with paired intervals, and figures.

    Runs are named by the settings in which they differ. Differences are computed pair by pair on
    the same held-out pairs; a metric whose meaning differs between the runs (another SAE, other
    pairs) is left out and said so. The folder receives compare.html, figures/*.png, tables/*.tex
    and data/*.parquet. With no RUN it says
    which there are.

    \b
    Examples:
      fpo run quickstart
      fpo run quickstart --set train.method=dpo
      fpo store ls                                    names the evaluations
      fpo compare evaluation/b904 evaluation/77ae     two of them
      fpo compare quickstart smollm2-sae -o reports/saes
      fpo compare policy/1c policy/9d --json | jq '.metrics[] | select(.key == "accuracy")'
    """
    from cli.show import print_comparison, print_json
    from tasks.compare import compare_runs, write_comparison

    compared = compare_runs(open_store(store_url(store)), runs or [])
    page = write_comparison(compared, output)
    if as_json:
        names = [run.evaluation for run in compared.report.runs]
        print_json({**compared.comparison._asdict(), "evaluations": names, "page": page})
    else:
        print_comparison(compared.report)
    logging.getLogger("fpo").info("comparison %s", page)
