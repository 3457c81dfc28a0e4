"""``fpo-pipeline``: the stages of a recipe, in order, each reused where it is done.

pairs -> reference -> features -> policy -> evaluation
(+ instructions -> sft, a warm start, and sae, where one is trained; answers -> scores, a benchmark)
"""

from collections.abc import Sequence

from prefect import flow
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
    with run.recorded(stages):
        if run.recipe.resources.pools is not None and deployment.id:
            given = {"recipe": recipe, "overrides": overrides, "force": force, "store": store}
            outcomes = bring_about_on_pools(run, stages, given, bring_about)
        else:
            outcomes = bring_about(run, stages)
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


def _in_order(run: PipelineRun, stages: Sequence[str]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = {}
    if "instructions" in stages:
        outcomes["instructions"] = instructions(run)
    if "sft" in stages:
        outcomes["sft"] = sft(run)
    if "sae" in stages:
        outcomes["sae"] = sae(run)
    if "tokenize" in stages:
        outcomes["tokenize"] = tokenize(run)
    caches = [stage for stage in stages if kind_of(stage) == "features"]
    if "reference" in stages:
        outcomes["reference"] = reference(run, caches)
    for number, stage in enumerate(caches, 1):
        outcomes[stage] = features(run, stage, caches[number:])
    if "train" in stages:
        outcomes["train"] = train(run)
    for stage in stages:
        if kind_of(stage) == "generate":
            outcomes[stage] = generate(run, stage)
        elif kind_of(stage) == "benchmark":
            outcomes[stage] = benchmark(run, stage)
    if "evaluate" in stages:
        outcomes["evaluate"] = evaluate(run)
    return outcomes
