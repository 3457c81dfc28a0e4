"""``fpo-pipeline``: the stages of a recipe, in order, each reused where it is done.

pairs -> reference -> features -> policy -> evaluation   (+ sae, where one is trained)
"""

import logging
from pathlib import Path

from prefect import flow

from fpo_core.recipe import load_recipe
from storage.store import open_store
from tasks.evaluate import evaluate
from tasks.features import features
from tasks.plan import make_plan, selected_stages
from tasks.reference import reference
from tasks.report import is_current, write_report
from tasks.run import Outcome, PipelineRun
from tasks.sae import sae
from tasks.tokenize import tokenize
from tasks.train import train

log = logging.getLogger("fpo.flow")


@flow(name="fpo-pipeline", flow_run_name="{recipe}", validate_parameters=True)
def fpo_pipeline(
    recipe: str = "quickstart",
    overrides: list[str] | None = None,
    from_stage: str | None = None,
    only_stage: str | None = None,
    force: bool = False,
    store: str = "fpo-store",
    report_folder: str | None = None,
) -> dict[str, Outcome]:
    """Run a recipe's stages; what exists already is reused.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file.
        overrides: ``key.path=value`` settings on top of the recipe.
        from_stage: bring about this stage and the later ones; earlier ones must be done.
        only_stage: bring about this stage alone; its inputs must be done.
        force: compute the selected stages again even where their artifacts exist.
        store: the artifact store, a folder.
        report_folder: where the report goes; ``reports/RECIPE-METHOD`` where left out.
    """
    settings = load_recipe(recipe, overrides or [])
    artifacts = open_store(store)
    artifacts.check_writable()
    plan = make_plan(settings, artifacts)
    stages = selected_stages(plan, from_stage, only_stage)
    run = PipelineRun(settings, artifacts, plan, frozenset(stages if force else ()))
    outcomes: dict[str, Outcome] = {}
    if "sae" in stages:
        outcomes["sae"] = sae(run)
    if "tokenize" in stages:
        outcomes["tokenize"] = tokenize(run)
    if "reference" in stages:
        outcomes["reference"] = reference(run, with_features="features" in stages)
    if "features" in stages:
        outcomes["features"] = features(run)
    if "train" in stages:
        outcomes["train"] = train(run)
    if "evaluate" in stages:
        outcomes["evaluate"] = evaluate(run)
        folder = Path(report_folder or default_report_folder(run))
        nothing_new = all(outcome.state == "reused" for outcome in outcomes.values())
        if not (nothing_new and is_current(run, folder)):
            write_report(run, folder, outcomes)
        log.info("report     %s", folder / "report.html")
    return outcomes


def default_report_folder(run: PipelineRun) -> Path:
    """Where a recipe's report goes: one folder a recipe and method."""
    return Path("reports") / f"{run.recipe.name}-{run.recipe.train.method}"
