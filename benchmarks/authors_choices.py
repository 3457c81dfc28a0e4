"""What the choices of the authors' public code do to a recipe's numbers.

    python -m benchmarks.authors_choices [--recipe quickstart]

Trains FPO as in the paper, with each choice alone and with all of them, and prints a Markdown
table. Every run is an ordinary ``fpo run``; the discrepancy is measured on all policies alike, as
in Eq. 10 on the recipe's own hookpoint. A mean over the padded length T of a batch, where ours is
over the n scored positions, scales a response's D by (n / T)^2; here the mean of that factor over
the training batches scales alpha, which leaves out that it differs from response to response, and
that their mean takes in the prompt's activations.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.methods import evaluation, run
from fpo_core.quiet import set_quiet_defaults
from fpo_core.recipe import Recipe, load_recipe
from fpo_core.recipe.methods import METHODS
from storage.location import open_store
from storage.store import Store
from tasks.plan import make_plan
from tasks.run import PipelineRun, prepare_run
from tasks.transfer import local_folder, local_shards

COLUMNS = (("accuracy", 3), ("margin", 3), ("kl_chosen", 2), ("kl_rejected", 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--store", default="fpo-store")
    options = parser.parse_args(arguments)
    store = open_store(options.store)
    run(options.recipe, [], options.store, "authors-paper")
    paper, _ = prepare_run(options.recipe, [], options.store)
    alpha = METHODS["fpo"].alpha or 1.0
    padded = f"train.alpha={alpha * padded_share(paper):.4f}"
    policy, norm = "train.index_set=policy", "sae.site=final_norm"
    variants = {
        "as in the paper": [],
        "the policy's top-k alone": [policy],
        "the hidden state after the final norm": [norm],
        "mean over the padded length": [padded],
        "all three": [policy, norm, padded],
    }
    print("| | settings | accuracy | margin | KL chosen | KL rejected | D (Eq. 10) |")
    print("|---|---|---|---|---|---|---|")
    for number, (name, overrides) in enumerate(variants.items()):
        run(options.recipe, overrides, options.store, f"authors-{number}")
        cells = [f"`{' '.join(overrides)}`" if overrides else ""]
        found = _metrics(options.recipe, overrides, store)
        cells += [f"{found[key]['policy']['value']:.{digits}f}" for key, digits in COLUMNS]
        policy_folder = _policy(load_recipe(options.recipe, overrides), store)
        print(f"| {name} | {' | '.join(cells)} | {discrepancy(paper, policy_folder):.3f} |")


def padded_share(paper: PipelineRun) -> float:
    """Mean over training responses of (scored tokens / padded length of their batch)^2."""
    from fpo_core.training.examples import AlignedShards
    from fpo_core.training.stream import ExampleStream

    shards = AlignedShards(local_shards(paper.artifact("tokenize")), (), (), 1, "train")
    shares = []
    with ExampleStream(shards, paper.recipe.train, lambda _: None) as stream:
        for _, batch in stream.batches():
            lengths = [
                (len(ids.prompt), len(response))
                for ids in (example.ids for example in batch)
                for response in (ids.chosen, ids.rejected)
            ]
            longest = max(prompt + response for prompt, response in lengths)
            shares += [(response / longest) ** 2 for _, response in lengths]
    return float(np.mean(shares))


def discrepancy(paper: PipelineRun, policy_folder: Path) -> float:
    """Mean D of a policy on the held-out pairs, as the paper defines it."""
    from fpo_core.evaluation.audit import Groups
    from fpo_core.evaluation.heldout import score_heldout
    from fpo_core.models.load import load_model, prepare_cpu
    from fpo_core.sae.coder import AttachedSae
    from fpo_core.training.examples import FeatureShards, read_examples
    from tasks.offline import attached_coder

    recipe = paper.recipe
    prepare_cpu(recipe.resources.threads)
    options = {"dtype": recipe.model.dtype, "attention": recipe.model.attention}
    reference = load_model(paper.reference_folder(), **options)
    sae = AttachedSae(attached_coder(paper, reference), recipe.sae.hookpoint)
    pooled = local_shards(paper.artifact("features"), "pooled")
    examples = read_examples(
        local_shards(paper.artifact("tokenize")), local_shards(paper.artifact("reference")),
        [FeatureShards(pooled, (), sae.coder.d_sae, (), "features")], recipe.train.k, "heldout",
    )  # fmt: skip
    scores = score_heldout(
        load_model(policy_folder, **options), reference, examples, sae,
        Groups({}, sae.coder.d_sae), k=recipe.train.k,
        tokens_per_batch=recipe.resources.tokens_per_batch,
    )  # fmt: skip
    return float(scores.discrepancy.mean())


def _metrics(recipe: str, overrides: list[str], store: Store) -> dict[str, Any]:
    records = json.loads(evaluation(recipe, overrides, store).path("metrics.json").read_text())
    return {record["key"]: record for record in records}


def _policy(recipe: Recipe, store: Store) -> Path:
    planned = make_plan(recipe, store).stages["train"]
    return local_folder(store.artifact(planned.artifact, planned.version), "model")


if __name__ == "__main__":
    set_quiet_defaults()
    main()
