"""``fpo audit``: what training moved, feature by feature, on the held-out pairs of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
import pyarrow.compute as pc

from fpo_core.errors import FPOError
from fpo_core.models.load import inference_device, load_model, prepare_cpu
from fpo_core.progress import Progress
from tasks.offline import attached_coder, read_pair_ids
from tasks.run import PipelineRun
from tasks.transfer import local_folder


class Audit(NamedTuple):
    """What training moved."""

    policy: str  # artifact
    pairs: int
    features: pl.DataFrame  # a row a feature and side that ever fires; largest effects first
    groups: pl.DataFrame  # the same of the groups' means, where there are any


def audit_run(
    run: PipelineRun, groups: Mapping[str, Sequence[int]], against: Sequence[tuple[str, str]] = ()
) -> Audit:
    """Measure how the features of a recipe's first SAE moved between reference and policy.

    Args:
        run: a run whose policy is trained.
        groups: features by the name of a group, beside those of the recipe.
        against: groups whose difference is told too.

    Raises:
        FPOError: the policy is not trained, there are too few held-out pairs, or a group is none
            of this SAE's.
    """
    from fpo_core.evaluation.audit import (
        Groups,
        audit_moments,
        audit_table,
        check_against,
        group_table,
    )
    from fpo_core.sae.coder import AttachedSae

    if run.missing("train"):
        raise FPOError(
            f"{run.planned('train').name} is not trained yet: `fpo run` with the same recipe and "
            f"--set makes it"
        )
    recipe = run.recipe
    groups = {**recipe.train.group_features, **groups}
    check_against(groups, against)
    prepare_cpu(recipe.resources.threads)
    options = {"dtype": recipe.model.dtype, "attention": recipe.model.attention,
               "device": inference_device()}  # fmt: skip
    policy = load_model(local_folder(run.artifact("train"), "model"), **options)
    reference = load_model(run.reference_folder(), **options)
    coder = attached_coder(run, reference, decoder=False).to(options["device"])
    asked = Groups(groups, coder.d_sae, against)
    pairs = _heldout(run)
    sae = AttachedSae(coder, recipe.hookpoints[0])
    with Progress("held-out pairs", total=len(pairs), unit="pair") as progress:
        moments, grouped = audit_moments(
            policy, reference, pairs, sae, asked,
            tokens_per_batch=recipe.resources.tokens_per_batch, on_pairs=progress.advance,
        )  # fmt: skip
    return Audit(
        run.planned("train").name, len(pairs), audit_table(moments), group_table(asked, grouped)
    )


def _heldout(run: PipelineRun) -> list[Any]:
    pairs = []
    for table in run.artifact("tokenize").tables():
        heldout = table.filter(pc.field("split") == "heldout")
        pairs += read_pair_ids(heldout.combine_chunks()) if heldout.num_rows else []
    if len(pairs) < 3:
        raise FPOError(
            f"{len(pairs)} held-out pairs are too few for an interval; name more in data.heldout"
        )
    return pairs
