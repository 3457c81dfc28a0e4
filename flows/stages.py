"""A flow for each stage, to run it again by itself; and ``fpo-stages``, for whole groups of them.

``prefect deployment run fpo-features/gemma2b`` brings that stage about: it reuses what is done,
goes on with what was begun and, with ``force``, computes anew. Its inputs have to be there.
"""

from collections.abc import Sequence
from typing import Any

from prefect import Flow, flow

from flows.parameters import (
    PARAMETERS,
    Force,
    Overrides,
    RecipeName,
    StageName,
    StoreUrl,
    run_name,
)
from flows.pipeline import bring_about
from flows.pools import end_of_taken_over
from tasks.announce import announce_run, tag_run
from tasks.run import Outcome, prepare_run


def _flow_of(stage: str, kinds: Sequence[str], about: str) -> Flow[Any, dict[str, Outcome]]:
    """The flow ``fpo-STAGE``, which brings about the stages of some kinds."""

    def run(
        recipe: RecipeName,
        overrides: Overrides = [],  # noqa: B006  Prefect copies it, and its form shows a list
        force: Force = False,
        store: StoreUrl = None,
    ) -> dict[str, Outcome]:
        return _run(kinds, recipe, overrides, store, force=force)

    run.__name__ = f"fpo_{stage}"
    run.__doc__ = f"{about}\n\n{PARAMETERS}"  # where Prefect finds the form's words
    return flow(name=f"fpo-{stage}", flow_run_name=run_name)(run)


fpo_tokenize = _flow_of(
    "tokenize", ("instructions", "tokenize"),
    "Tokenize the preference pairs, and the dialogues of a warm start.",
)  # fmt: skip
fpo_sae = _flow_of("sae", ("sae",), "Train the SAE of a recipe that has one to train.")
fpo_reference = _flow_of("reference", ("reference",), "Cache the reference model's log-probs.")
fpo_features = _flow_of(
    "features", ("features",), "Cache the reference's features, of every SAE of the recipe."
)
fpo_train = _flow_of(
    "train", ("train",),
    "Train the policy; one that was interrupted goes on from its newest checkpoint.",
)  # fmt: skip
fpo_evaluate = _flow_of(
    "evaluate", ("generate", "benchmark", "evaluate"),
    "Answer and judge the recipe's benchmarks, and measure the policy on held-out pairs.",
)  # fmt: skip


@flow(name="fpo-stages", flow_run_name=run_name)
def fpo_stages(
    recipe: RecipeName,
    stages: list[StageName],
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Some stages of a recipe, on the pool of the deployment: what ``fpo-pipeline`` hands over.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file as the worker sees it.
        stages: to bring about, in the pipeline's order.
        overrides: settings on top of the recipe, each ``key.path=value``.
        force: compute these stages anew, dropping what there is of them.
        store: a folder or ``s3://bucket/prefix``; where left out, the worker's, or the recipe's.
    """
    return _run(stages, recipe, overrides, store, force=force)


def _run(
    kinds: Sequence[str], recipe: str, overrides: Sequence[str], store: str | None, *, force: bool
) -> dict[str, Outcome]:
    if (ended := end_of_taken_over()) is not None:
        return ended
    run, stages = prepare_run(recipe, overrides, store, kinds=kinds, force=force)
    tag_run(run)
    with run.recorded(stages):
        outcomes = bring_about(run, stages)
        announce_run(outcomes)
    return outcomes
