"""A flow for each stage, to run it again by itself; and ``fpo-stages``, for whole groups of them.

``prefect deployment run fpo-features/gemma2b`` brings that stage about: it reuses what is done,
goes on with what was begun and, with ``force``, computes anew. Its inputs have to be there.
"""

from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.parameters import Force, Overrides, RecipeName, StageName, StoreUrl, run_name
from flows.pipeline import bring_about
from flows.pools import refuse_endless_takeover
from tasks.announce import announce_run, tag_run
from tasks.run import Outcome, prepare_run


@flow(name="fpo-tokenize", flow_run_name=run_name)
def fpo_tokenize(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Tokenize the preference pairs, and the dialogues of a warm start."""
    return _run(("instructions", "tokenize"), recipe, overrides, store, force=force)


@flow(name="fpo-sae", flow_run_name=run_name)
def fpo_sae(
    recipe: RecipeName = "smollm2-sae",
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Train the SAE of a recipe that has one to train."""
    return _run(("sae",), recipe, overrides, store, force=force)


@flow(name="fpo-reference", flow_run_name=run_name)
def fpo_reference(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Cache the reference model's log-probs."""
    return _run(("reference",), recipe, overrides, store, force=force)


@flow(name="fpo-features", flow_run_name=run_name)
def fpo_features(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Cache the reference's SAE features, of every SAE of the recipe."""
    return _run(("features",), recipe, overrides, store, force=force)


@flow(name="fpo-train", flow_run_name=run_name)
def fpo_train(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Train the policy; one that was interrupted goes on from its newest checkpoint."""
    return _run(("train",), recipe, overrides, store, force=force)


@flow(name="fpo-evaluate", flow_run_name=run_name)
def fpo_evaluate(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Answer and judge the recipe's benchmarks, and measure the policy on held-out pairs."""
    return _run(("generate", "benchmark", "evaluate"), recipe, overrides, store, force=force)


@flow(name="fpo-stages", flow_run_name=run_name)
def fpo_stages(
    recipe: RecipeName = "quickstart",
    overrides: Overrides = [],  # noqa: B006
    stages: Annotated[
        list[StageName], Field(description="Stages to bring about, in the pipeline's order.")
    ] = ["tokenize"],  # noqa: B006
    force: Force = False,
    store: StoreUrl = None,
) -> dict[str, Outcome]:
    """Some stages of a recipe, on the pool of the deployment: what ``fpo-pipeline`` hands over."""
    return _run(stages, recipe, overrides, store, force=force)


def _run(
    kinds: Sequence[str], recipe: str, overrides: Sequence[str], store: str | None, *, force: bool
) -> dict[str, Outcome]:
    refuse_endless_takeover()
    run, stages = prepare_run(recipe, overrides, store, kinds=kinds, force=force)
    tag_run(run)
    with run.recorded(stages):
        outcomes = bring_about(run, stages)
        announce_run(outcomes)
    return outcomes
