"""``fpo-pipeline``: the stages of a recipe, in order, each reused where it is done.

pairs -> reference -> features -> policy -> evaluation
(+ instructions -> sft, a warm start, and sae, where one is trained; answers -> scores, a benchmark)
"""

from collections.abc import Sequence

from prefect import flow

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


@flow(name="fpo-pipeline", flow_run_name="{recipe}", validate_parameters=True)
def fpo_pipeline(
    recipe: str = "quickstart",
    overrides: list[str] | None = None,
    from_stage: str | None = None,
    only_stage: str | None = None,
    force: bool = False,
    store: str | None = None,
    report_folder: str | None = None,
) -> dict[str, Outcome]:
    """Run a recipe's stages; what exists already is reused.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file.
        overrides: ``key.path=value`` settings on top of the recipe.
        from_stage: bring about this stage and the later ones; earlier ones must be done.
        only_stage: bring about this stage alone; its inputs must be done.
        force: compute the selected stages again even where their artifacts exist.
        store: the artifact store, a folder or ``s3://bucket/prefix``; where left out, that of
            ``FPO_STORE``, or of the recipe.
        report_folder: where the report goes; ``reports/RECIPE-METHOD`` where left out.
    """
    run, stages = prepare_run(
        recipe, overrides or [], store, first=from_stage, only=only_stage, force=force
    )
    with run.recorded(stages):
        outcomes = _bring_about(run, stages)
        if "evaluate" in stages:
            bring_report(run, report_folder, outcomes)
    return outcomes


def _bring_about(run: PipelineRun, stages: Sequence[str]) -> dict[str, Outcome]:
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
