"""``fpo audit``: what training moved, feature by feature, on the held-out pairs of a run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.compute as pc

from fpo_core.errors import FPOError
from fpo_core.models.load import inference_device, load_model, prepare_cpu
from fpo_core.progress import Progress
from tasks.offline import attached_coder, read_pair_ids
from tasks.run import PipelineRun
from tasks.transfer import local_folder

RATE = 0.05  # false discovery rate at which a feature counts as moved


class Audit(NamedTuple):
    """What training moved."""

    policy: str  # artifact
    pairs: int
    features: pl.DataFrame  # a row a feature and side that ever fires; largest effects first
    groups: pl.DataFrame  # the same of the groups' means; with ``size``


def audit_run(run: PipelineRun, groups: Mapping[str, Sequence[int]]) -> Audit:
    """Measure how the features of a recipe's first SAE moved between reference and policy.

    Args:
        run: a run whose policy is trained.
        groups: features by the name of a group, beside those of the recipe.

    Raises:
        FPOError: the policy is not trained, there are too few held-out pairs, or a group names a
            feature that the SAE does not have.
    """
    from fpo_core.evaluation.audit import SIDES, audit_moments, changes, discovery_rates
    from fpo_core.sae.coder import AttachedSae

    if run.missing("train"):
        raise FPOError(
            f"{run.planned('train').name} is not trained yet: `fpo run` with the same recipe and "
            f"--set makes it"
        )
    recipe = run.recipe
    groups = {**{group.name: group.features for group in recipe.train.groups}, **groups}
    prepare_cpu(recipe.resources.threads)
    options = {"dtype": recipe.model.dtype, "attention": recipe.model.attention,
               "device": inference_device()}  # fmt: skip
    policy = load_model(local_folder(run.artifact("train"), "model"), **options)
    reference = load_model(run.reference_folder(), **options)
    coder = attached_coder(run, reference, decoder=False).to(options["device"])
    _check_groups(groups, coder.d_sae)
    pairs = _heldout(run)
    sae = AttachedSae(coder, recipe.hookpoints[0])
    with Progress("held-out pairs", total=len(pairs), unit="pair") as progress:
        moments, grouped = audit_moments(
            policy, reference, pairs, sae, groups,
            tokens_per_batch=recipe.resources.tokens_per_batch, on_pairs=progress.advance,
        )  # fmt: skip
    both = [changes(moments, side) for side in (0, 1)]
    fires = np.stack([(one.reference > 0) | (one.policy > 0) for one in both])
    rates = discovery_rates(np.stack([one.p for one in both]), fires)
    frames = []
    for side, found in enumerate(both):
        columns: dict[str, Any] = {"feature": np.arange(coder.d_sae, dtype=np.uint32)}
        columns |= {**found._asdict(), "q": rates[side]}
        frame = pl.DataFrame(columns).insert_column(1, pl.lit(SIDES[side]).alias("side"))
        frames.append(frame.filter(pl.Series(fires[side])))
    features = pl.concat(frames).sort(
        [pl.col("q") >= RATE, pl.col("effect").abs(), "feature"], descending=[False, True, False]
    )
    names = list(groups)
    of_groups = [
        pl.DataFrame({"group": names, "size": [len(groups[n]) for n in names],
                      **changes(grouped, side)._asdict()})
        .insert_column(2, pl.lit(SIDES[side]).alias("side"))
        for side in (0, 1)
    ]  # fmt: skip
    name = run.planned("train").name
    return Audit(name, len(pairs), features, pl.concat(of_groups) if names else pl.DataFrame())


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


def _check_groups(groups: Mapping[str, Sequence[int]], d_sae: int) -> None:
    for name, members in groups.items():
        beyond = [feature for feature in members if not 0 <= feature < d_sae]
        if beyond or not members:
            raise FPOError(
                f"group {name}: "
                + (f"feature {beyond[0]} is not in this SAE, whose features are 0 to {d_sae - 1}"
                   if beyond else "it has no features")
            )  # fmt: skip
