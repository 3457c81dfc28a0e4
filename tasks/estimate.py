"""What a run of a recipe would cost, before it runs, and what the figures rest on.

``tasks.costs`` calculates; here it is found out what is known of model, SAEs and data, and how
fast a stage is: as an earlier artifact of the same stage and model was made, where the store has
one, else as fast as its operations at a stated rate. No torch is imported.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from fpo_core.models.shape import model_shape
from fpo_core.recipe import Recipe
from fpo_core.sae.source import declared_width
from storage.artifact import artifact_key
from storage.errors import StoreError
from storage.manifest import MANIFEST
from storage.store import Store
from tasks.costs import Cost, Facts, stage_cost
from tasks.plan import Plan, StagePlan
from tasks.texts import Texts, dialogue_texts, pair_texts, texts_of_artifact

# Nvidia's data sheet, bfloat16 without sparsity; and the share of it that a pass is taken to reach:
# on an H200, as fast, 0.23 forward and 0.20 to 0.25 of a step (docs/performance.md); an H100's
# memory is slower.
H100_FLOPS, UTILIZATION = 989e12, 0.2

_RECENT = 8  # earlier artifacts of a stage that are looked at
_WIDTH = re.compile(r"width_(\d+)([km])")


class WhatIf(NamedTuple):
    """Data that is supposed instead of the recipe's; None: the recipe's."""

    pairs: int | None = None  # of the train split
    prompt_tokens: float | None = None  # mean of a prompt
    response_tokens: float | None = None  # mean of one answer


class Estimate(NamedTuple):
    """One stage that a run would compute; None where it is not known what it depends on."""

    stage: str
    tokens: float | None
    bytes: float | None  # stored
    flops: float | None
    seconds: float | None
    time_from: str  # `H100`: of one, from the operations; else the artifact, or stage, as it ran


class Estimates(NamedTuple):
    """The stages that a run would compute, and what their figures rest on."""

    stages: tuple[Estimate, ...]
    rests_on: tuple[str, ...]
    bytes: float  # of all stages together, as far as they are known
    h100_hours: float  # of the stages whose time is from operations


def estimate_plan(
    recipe: Recipe, plan: Plan, store: Store, what_if: WhatIf, stages: Collection[str] | None = None
) -> Estimates:
    """Estimate the stages that are missing; with other data than the recipe's, all of them.

    Args:
        recipe: the recipe.
        plan: its plan on the store.
        store: whose earlier artifacts tell lengths and rates.
        what_if: data that is supposed instead of the recipe's.
        stages: estimate these alone; None: all.
    """
    supposed = any(value is not None for value in what_if)
    facts, rests_on = _facts(recipe, plan, store, what_if)
    missing = [
        name
        for name, stage in plan.stages.items()
        if (supposed or stage.state != "complete") and (stages is None or name in stages)
    ]
    estimates = tuple(
        _estimate(plan.stages[name], stage_cost(name, missing, facts), store) for name in missing
    )
    on_h100 = [stage.seconds or 0.0 for stage in estimates if stage.time_from == "H100"]
    if on_h100:
        rests_on.append(
            f"an H100 does {UTILIZATION:.0%} of its {H100_FLOPS / 1e12:.0f} TFLOP/s (bfloat16): "
            f"about what an H200 did of it with this model's shape (docs/performance.md)"
        )
    stored = sum(stage.bytes or 0.0 for stage in estimates)
    return Estimates(estimates, tuple(dict.fromkeys(rests_on)), stored, sum(on_h100) / 3600)


def _facts(
    recipe: Recipe, plan: Plan, store: Store, what_if: WhatIf
) -> tuple[Facts, list[str]]:  # fmt: skip
    """What is known of model, SAEs and data, and a sentence on each."""
    told: list[str] = []
    shape = None
    if found := model_shape(recipe.model.source, recipe.model.revision):
        shape, known_from = found
        told.append(
            f"model {recipe.model.source}: {shape.params / 1e9:.2f} billion parameters, by "
            f"{known_from}"
        )
    else:
        told.append(f"model {recipe.model.source}: its config.json is not here")
    widths = tuple(_width(recipe, number, told) for number in range(len(recipe.hookpoints)))
    train, heldout = (_pairs(recipe, plan, store, split, what_if) for split in ("train", "heldout"))
    dialogues = _counted(plan, store, "instructions") or dialogue_texts(recipe)
    told += [_sentence("train pairs", train), _sentence("held-out pairs", heldout)]
    if recipe.sft:
        told.append(_sentence("dialogues", dialogues))
    return Facts(recipe, shape, widths, train, heldout, dialogues), told


def _sentence(name: str, texts: Texts | None) -> str:
    if texts is None:
        remedy = "" if name == "dialogues" else (
            "; --pairs, --prompt-tokens and --response-tokens tell them"
        )  # fmt: skip
        return f"{name}: number and lengths are not known here{remedy}"
    return (
        f"{texts.rows:,} {name}, each {texts.prompt:,.0f} tokens of prompt and "
        f"{texts.answers:,.0f} of answers: {texts.known_from}"
    )


def _pairs(
    recipe: Recipe, plan: Plan, store: Store, split: str, what_if: WhatIf
) -> Texts | None:  # fmt: skip
    """The pairs of a split, with what is supposed of them."""
    texts = _counted(plan, store, "tokenize", split) or pair_texts(recipe, split)
    pairs = what_if.pairs if split == "train" else None
    prompt, response = what_if.prompt_tokens, what_if.response_tokens
    if texts is None:
        if prompt is None or response is None or what_if.pairs is None:
            return None
        texts = Texts(0, 0.0, 0.0, "")  # held-out pairs: none
    given = {"number": pairs, "prompts": prompt, "answers": response}
    asked = [f"{name} as asked" for name, value in given.items() if value is not None]
    return Texts(
        texts.rows if pairs is None else pairs,
        texts.prompt if prompt is None else prompt,
        texts.answers if response is None else 2 * response,
        "; ".join(part for part in (", ".join(asked), texts.known_from) if part),
    )


def _counted(plan: Plan, store: Store, stage: str, split: str | None = None) -> Texts | None:
    """From the artifact of token ids, where it is there; a split is taken to have its means."""
    planned = plan.stages.get(stage)
    if planned is None or planned.state != "complete":
        return None
    manifest = store.artifact(planned.artifact, planned.version).manifest
    texts = texts_of_artifact(manifest)
    return texts._replace(rows=manifest["stats"]["pairs"][split]) if split else texts


def _width(recipe: Recipe, number: int, told: list[str]) -> int | None:
    """d_sae: of the recipe, of the SAE's files, or as a release that is not here is named."""
    if number == 0 and recipe.sae.train:
        return recipe.sae.train.d_sae
    source = recipe.sae.source if number == 0 else recipe.sae.also[number - 1].source
    assert source is not None
    width = declared_width(source)
    if width is not None:
        return width
    named = _WIDTH.search(source)
    if named is None:
        told.append(f"SAE {source}: it is not here, so its width is not known")
        return None
    width = int(named[1]) * (1024 if named[2] == "k" else 1024**2)
    told.append(f"SAE {source}: {width:,} features, by its name")
    return width


def _estimate(planned: StagePlan, cost: Cost, store: Store) -> Estimate:
    """The cost with the time that it takes."""
    seconds, time_from = None, cost.pass_of
    recorded = None if cost.pass_of else _recorded_rate(planned, store)
    if recorded and cost.tokens is not None:
        time_from, rate = recorded
        seconds = cost.tokens / rate
    elif cost.flops is not None:
        seconds, time_from = cost.flops / (H100_FLOPS * UTILIZATION), "H100"
    return Estimate(planned.stage, cost.tokens, cost.bytes, cost.flops, seconds, time_from)


def _recorded_rate(planned: StagePlan, store: Store) -> tuple[str, float] | None:
    """The newest artifact of the same stage, model and dtype that tells its tokens/s."""
    entries = store.backend.list(artifact_key(planned.artifact, ""))
    manifests = [entry for entry in entries if entry.key.endswith(f"/{MANIFEST}")]
    for entry in sorted(manifests, key=lambda entry: -entry.modified)[:_RECENT]:
        version = entry.key.split("/")[2]
        try:
            manifest = store.artifact(planned.artifact, version).manifest
        except StoreError:
            continue  # damaged, removed just now, or of another release: it tells no rate
        rate = manifest["stats"].get("tokens_per_second")
        if rate and _alike(manifest, planned):
            return f"{planned.artifact}/{version}", rate
    return None


def _alike(manifest: Mapping[str, Any], planned: StagePlan) -> bool:
    """Whether an artifact is of the model and dtype that are planned."""
    ours = planned.inputs.get("model"), planned.recipe.get("dtype")
    return (manifest["inputs"].get("model"), manifest["recipe"].get("dtype")) == ours
