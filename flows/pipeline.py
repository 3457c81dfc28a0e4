"""``fpo-pipeline``: the stages of a recipe, in order, each reused where it is done.

pairs -> reference -> features -> policy -> evaluation
(+ instructions -> sft, a warm start, and sae, where one is trained; answers -> scores, a benchmark)
"""

from collections.abc import Callable, Sequence
from typing import Any

from prefect import Task, flow
from prefect.context import FlowRunContext
from prefect.runtime import deployment

from flows.parameters import (
    Force,
    Overrides,
    RecipeName,
    StageName,
    StoreUrl,
    run_name,
)
from flows.pools import bring_about_on_pools, cancel_children, end_of_taken_over
from tasks.announce import announce_report, announce_run, progress_shown, tag_run
from tasks.benchmark import benchmark
from tasks.evaluate import evaluate
from tasks.features import features
from tasks.generate import generate
from tasks.plan import kind_of
from tasks.reference import reference
from tasks.report import bring_report
from tasks.run import Outcome, PipelineRun, prepare_run
from tasks.sae import sae
from tasks.sft import sft
from tasks.tokenize import instructions, tokenize
from tasks.train import train


@flow(
    name="fpo-pipeline",
    flow_run_name=run_name,
    validate_parameters=True,
    on_cancellation=[cancel_children],
    on_crashed=[cancel_children],
)
def fpo_pipeline(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006  Prefect copies it, and its form shows a list
    from_stage: StageName | None = None,
    only_stage: StageName | None = None,
    force: Force = False,
    store: StoreUrl = None,
    report_folder: str | None = None,
) -> dict[str, Outcome]:
    """Run a recipe's stages; what exists already is reused.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file as the worker sees it.
        overrides: settings on top of the recipe, each ``key.path=value``: ``train.alpha=1.0``.
        from_stage: bring about this stage and the later ones; earlier ones must be done.
        only_stage: bring about this stage alone; its inputs must be done.
        force: compute the selected stages anew, dropping what there is of them, a training's
            checkpoints too.
        store: a folder or ``s3://bucket/prefix``; where left out, the worker's ``FPO_STORE``, or
            the recipe's.
        report_folder: where the report goes on the worker; ``reports/RECIPE-METHOD`` where left
            out.
    """
    if (ended := end_of_taken_over()) is not None:
        return ended
    run, stages = prepare_run(
        recipe, overrides, store, first=from_stage, only=only_stage, force=force
    )
    tag_run(run)
    if run.recipe.resources.pools is not None and deployment.id:
        given = {"recipe": recipe, "overrides": overrides, "force": force, "store": store}
        return run_prepared(
            run,
            stages,
            report_folder,
            lambda run, stages: bring_about_on_pools(run, stages, given, bring_about),
        )
    return run_prepared(run, stages, report_folder)


def run_prepared(
    run: PipelineRun,
    stages: Sequence[str],
    report_folder: str | None,
    compute: Callable[[PipelineRun, Sequence[str]], dict[str, Outcome]] | None = None,
) -> dict[str, Outcome]:
    """Run a recipe's stages, record the run and write its report.

    Inside a flow run the stages are its tasks, and Prefect's UI gets its artifacts. Outside one
    they are plain calls.

    Args:
        run: the pipeline run.
        stages: their names, as planned.
        report_folder: where the report goes; ``reports/RECIPE-METHOD`` by default.
        compute: computes the stages; ``bring_about`` by default.
    """
    with run.recorded(stages):
        outcomes = (compute or bring_about)(run, stages)
        announce_run(outcomes)
        if "evaluate" in stages:
            announce_report(run, bring_report(run, report_folder, outcomes))
    return outcomes


def bring_about(run: PipelineRun, stages: Sequence[str]) -> dict[str, Outcome]:
    """Bring about some stages in this process, in order.

    Args:
        run: the pipeline run.
        stages: their names, as planned.
    """
    with progress_shown():
        return _in_order(run, stages)


def _called(task: Task[..., Outcome], *arguments: Any) -> Outcome:
    """Call a stage's task; outside a flow run, its plain function."""
    return task(*arguments) if FlowRunContext.get() else task.fn(*arguments)


def _in_order(run: PipelineRun, stages: Sequence[str]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    if "instructions" in stages:
        outcomes["instructions"] = _called(instructions, run)
    if "sft" in stages:
        outcomes["sft"] = _called(sft, run)
    if "sae" in stages:
        outcomes["sae"] = _called(sae, run)
    if "tokenize" in stages:
        outcomes["tokenize"] = _called(tokenize, run)
    caches = [stage for stage in stages if kind_of(stage) == "features"]
    if "reference" in stages:
        outcomes["reference"] = _called(reference, run, caches)
    for number, stage in enumerate(caches, 1):
        outcomes[stage] = _called(features, run, stage, caches[number:])
    if "train" in stages:
        outcomes["train"] = _called(train, run)
    for stage in stages:
        if kind_of(stage) == "generate":
            outcomes[stage] = _called(generate, run, stage)
        elif kind_of(stage) == "benchmark":
            outcomes[stage] = _called(benchmark, run, stage)
    if "evaluate" in stages:
        outcomes["evaluate"] = _called(evaluate, run)
    return outcomes
