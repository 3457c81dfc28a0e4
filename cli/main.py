"""The ``fpo`` command: run and plan recipes, look at the store, write reports.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Heavy libraries are imported inside
the commands, so that ``--help`` is quick.
"""

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.audit import audit
from cli.bench import app as bench_app
from cli.browse import browse
from cli.cache import app as cache_app
from cli.compare import compare
from cli.data import app as data_app
from cli.prefect import app as prefect_app
from cli.sae import app as sae_app
from cli.store import AsJson, StoreUrl
from cli.store import app as store_app
from cli.sweep import sweep
from fpo_core.errors import FPOError, UsageError
from fpo_core.models.source import TINY_GEMMA
from fpo_core.quiet import set_quiet_defaults

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130

EXAMPLES = """
Align a model to preference pairs while holding its SAE features near a reference's (FPO).

\b
Examples:
  fpo run quickstart                          the whole pipeline, on a CPU
  fpo run quickstart --set train.alpha=1.0    trains and evaluates again, no more
  fpo run quickstart --set train.method=dpo   another objective, the same caches
  fpo run quickstart --only features --force  one stage by itself
  fpo plan gemma2b                            what would run, before it runs
  fpo data check my-pairs.jsonl               what a data file is read as
  fpo store ls                                what is stored
  fpo cache features quickstart               what tells chosen from rejected
  fpo report quickstart                       the report of a finished run
  fpo compare quickstart gemma2b              finished runs against each other
  fpo sweep quickstart --grid train.alpha=0.1,0.5,1     a run each, over the same caches
"""

app = typer.Typer(
    help=EXAMPLES, no_args_is_help=True, rich_markup_mode=None, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"fpo-pipeline {version('fpo-pipeline')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options of `fpo` itself; the help text is the app's."""


Recipe = Annotated[
    str, typer.Argument(help="A shipped recipe (quickstart, gemma2b, ...) or a .yaml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; can be repeated."),
]
FromStage = Annotated[
    str | None, typer.Option("--from", metavar="STAGE", help="This stage and the later ones.")
]
OnlyStage = Annotated[str | None, typer.Option("--only", metavar="STAGE", help="This stage alone.")]


@app.command(epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated.")
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    from_stage: FromStage = None,
    only_stage: OnlyStage = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compute the selected stages anew; drops the old ones.")
    ] = False,
    report_folder: Annotated[
        str | None,
        typer.Option(
            "--report", metavar="DIR", help="Where the report goes [reports/RECIPE-METHOD]."
        ),
    ] = None,
    estimate_cost: Annotated[
        bool,
        typer.Option("--estimate-cost", help="Only tell what the judge would cost."),
    ] = False,
    store: StoreUrl = None,
) -> None:
    """Run a recipe: tokenize, reference, features, train, benchmarks, evaluate.

    Stages that are done are reused; a run that was interrupted goes on where it stopped.

    \b
    Examples:
      fpo run quickstart
      fpo run quickstart --set train.method=simpo --set train.seed=1
      fpo run quickstart --from train --force
      fpo run my-recipe.yaml --estimate-cost
    """
    from tasks.report import bring_report
    from tasks.run import prepare_run

    log = logging.getLogger("fpo")
    # All mistakes show here, before Prefect starts. A flow prepares itself in the same way.
    prepared, stages = prepare_run(
        recipe, overrides or [], store, first=from_stage, only=only_stage, force=force
    )
    new = " (new)" if not next(prepared.store.backend.list("artifacts/"), None) else ""
    log.info(
        "recipe %s, method %s, store %s%s", prepared.recipe.name, prepared.recipe.train.method,
        prepared.store.url, new,
    )  # fmt: skip
    if estimate_cost:
        from cli.estimates import print_judging
        from tasks.judging_cost import judging_costs

        print_judging(judging_costs(prepared))
        return
    outcomes = prepared.reuse(stages)
    if outcomes is not None:
        if "evaluate" in outcomes:
            bring_report(prepared, report_folder, outcomes)
        return
    from flows.local import Given, run_pipeline

    given: Given = {
        "recipe": recipe,
        "overrides": overrides or [],
        "from_stage": from_stage,
        "only_stage": only_stage,
        "force": force,
        "store": store,
    }
    run_pipeline(prepared, stages, report_folder, given)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    from_stage: FromStage = None,
    only_stage: OnlyStage = None,
    pairs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Estimate for N training pairs, whatever is stored."),
    ] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option(min=0, metavar="N", help="... with prompts of N tokens.")
    ] = None,
    response_tokens: Annotated[
        float | None, typer.Option(min=1, metavar="N", help="... with answers of N tokens each.")
    ] = None,
    rehash: Annotated[
        bool,
        typer.Option("--rehash", help="Read every model, SAE and data file again; see below."),
    ] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would reuse, resume or compute, why, and what that would cost.

    A stage is computed where something that its result follows from is not as in any artifact that
    is stored; `why` says what, against the nearest one.

    Files are identified by content. Their digests are remembered until a file's inode, size or
    times change; --rehash forgets them all, for file systems whose times cannot be trusted.

    \b
    Examples:
      fpo plan quickstart --set train.alpha=1.0
      fpo plan quickstart --only features
      fpo plan gemma2b --pairs 10000000
    """
    from cli.estimates import print_estimates
    from cli.show import print_json, print_plan
    from cli.show_data import planned_lines
    from fpo_core.models.source import forget_digests
    from fpo_core.recipe import load_recipe
    from tasks.data_check import planned_sources
    from tasks.estimate import WhatIf, estimate_plan
    from tasks.plan import asked_stages, make_plan
    from tasks.reasons import explain_plan
    from tasks.run import recipe_store

    settings = load_recipe(recipe, overrides or [])
    artifacts = recipe_store(settings, store)
    if rehash:
        forget_digests()
    planned = make_plan(settings, artifacts)
    stages = asked_stages(planned, from_stage, only_stage)
    reasons = explain_plan(planned, artifacts)
    what_if = WhatIf(pairs, prompt_tokens, response_tokens)
    estimates = estimate_plan(settings, planned, artifacts, what_if, stages)
    sources = planned_sources(settings, planned, artifacts)
    if as_json:
        print_json({
            "recipe": settings.name, "store": artifacts.url,
            "stages": {name: planned.stages[name] for name in stages},
            "why": {name: why for name, why in reasons.items() if name in stages},
            "unresolved": planned.unresolved, "data": sources, "estimates": estimates,
        })  # fmt: skip
        return
    print_plan(settings, planned, artifacts, stages, reasons)
    for line in planned_lines(sources):
        print(line)
    print_estimates(estimates)


@app.command()
def report(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder [reports/RECIPE-METHOD].")
    ] = None,
    store: StoreUrl = None,
) -> None:
    """Write a finished run's report again.

    \b
    Example:
      fpo report quickstart --set train.method=dpo -o reports/dpo
    """
    from fpo_core.recipe import load_recipe
    from tasks.plan import make_plan
    from tasks.report import default_folder, write_report
    from tasks.run import PipelineRun, recipe_store

    settings = load_recipe(recipe, overrides or [])
    artifacts = recipe_store(settings, store)
    planned = make_plan(settings, artifacts)
    unfinished = [name for name, stage in planned.stages.items() if stage.state != "complete"]
    if unfinished:
        raise FPOError(
            f"recipe {settings.name!r} has not finished in the store {artifacts.url!r}: "
            f"{', '.join(unfinished)} missing; run `fpo run {recipe}` with the same --set first"
        )
    pipeline = PipelineRun(settings, artifacts, planned, frozenset())
    page = write_report(pipeline, output or default_folder(pipeline))
    logging.getLogger("fpo").info("report     %s", page)


@app.command()
def make_tiny_gemma(
    folder: Annotated[Path, typer.Argument(help="Made; new or empty.")] = Path(TINY_GEMMA),
    vocabulary: Annotated[
        int, typer.Option(help="Tokens of the model's vocabulary; Gemma-2 has 256000.")
    ] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Of the random weights.")] = 0,
) -> None:
    """Make what the recipe gemma2-tiny reads: a Gemma-2 and an SAE, small and random.

    \b
    Example:
      fpo make-tiny-gemma && fpo run gemma2-tiny
    """
    from fpo_core.models.random_gemma import make_tiny_gemma as make

    make(folder, vocabulary, seed)
    logging.getLogger("fpo").info("made       %s", folder)


app.command()(audit)
app.command()(browse)
app.command()(compare)
app.command()(sweep)
app.add_typer(store_app, name="store")
app.add_typer(data_app, name="data")
app.add_typer(sae_app, name="sae")
app.add_typer(bench_app, name="bench")
app.add_typer(prefect_app, name="prefect")
app.add_typer(cache_app, name="cache")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``fpo`` command; leaves by SystemExit.

    Args:
        arguments: of the command line; the process's own where left out.
    """
    set_quiet_defaults()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale that lacks a character ends nothing
            stream.reconfigure(errors="backslashreplace")
    # Prefect's own log lines are for its UI; here a person reads ours.
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_LOGGING_TO_API_ENABLED", "false")
    # The first start makes its database, which takes a slow disk longer than Prefect's 20 seconds.
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
    _log_to_terminal()
    from storage.errors import ArtifactCorrupt, StoreError

    try:
        code = app(args=arguments, standalone_mode=False)
        if code == INTERRUPTED:  # how typer hands on Ctrl-C
            raise KeyboardInterrupt
        sys.exit(code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except UsageError as error:
        _fail(error, WRONG_USAGE)
    except ArtifactCorrupt as error:
        name = f"{error.artifact}/{error.version}"
        _fail(error, FAILED, f". `fpo store repair {name}` computes again what is damaged")
    except (FPOError, StoreError) as error:
        _fail(error, FAILED)
    except PermissionError as error:
        _fail(FPOError(f"{error.filename}: no permission ({error.strerror})"), FAILED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the disk of the store's scratch folder or of FPO_CACHE"
        _fail(FPOError(f"{where}: no space left. What was finished is kept"), FAILED)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's usage errors
            error.show()  # pyright: ignore[reportAttributeAccessIssue]
            sys.exit(WRONG_USAGE)
        raise


def _fail(error: Exception, code: int, remedy: str = "") -> None:
    print(f"error: {error}{remedy}", file=sys.stderr)
    sys.exit(code)


def _log_to_terminal() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("fpo")
    logger.setLevel(os.environ.get("FPO_LOG", "INFO").upper())
    logger.handlers = [handler]
    logger.propagate = False


if __name__ == "__main__":
    main()
