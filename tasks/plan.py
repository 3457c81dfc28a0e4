"""What a run consists of: each stage's artifact version, and whether it is there already.

A version follows from the stage's schema version, the part of the recipe that changes its result
and the versions of its inputs. Models, SAEs and data enter by content, never by name. No torch
is imported here: planning is quick.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_core.data.sources.identity import Resolved
from fpo_core.errors import FPOError, UsageError
from fpo_core.models.architectures import architecture_named, check_attention
from fpo_core.models.shape import model_frame
from fpo_core.models.source import identify
from fpo_core.recipe import Recipe
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.options import objective_options
from fpo_core.recipe.training import OptimizerSettings, TrainSettings
from fpo_core.sae.source import declared_input_width, declared_width, identify_sae
from storage.lineage import input_artifacts
from storage.store import Store
from storage.version import artifact_version
from tasks.bench_plan import add_benchmarks, evaluation_questions, questions_digest
from tasks.data_plan import (
    DataSources,
    TemplateDate,
    digest_of,
    instructions_part,
    sae_text_part,
    template_date,
    tokenize_part,
)

# Stage -> the artifact it makes, in the order of the pipeline.
ARTIFACTS = {
    "instructions": "instructions",
    "sft": "sft",
    "sae": "sae",
    "tokenize": "pairs",
    "reference": "reference",
    "features": "features",
    "train": "policy",
    "generate": "answers",
    "benchmark": "scores",
    "evaluate": "evaluation",
}
STAGES = tuple(ARTIFACTS)

# Raise a stage's number when its code changes what it writes: old artifacts are not reused then.
SCHEMA_VERSIONS = {
    "instructions": 2, "sft": 1, "sae": 1, "tokenize": 2, "reference": 1, "features": 3, "train": 2,
    "generate": 1, "benchmark": 1, "evaluate": 4,
}  # fmt: skip


def kind_of(stage: str) -> str:
    """The kind of a stage: ``features`` of ``features@12``, those of a further SAE."""
    return stage.partition("@")[0]


def features_stages(recipe: Recipe) -> list[str]:
    """The stages of the SAEs' features: plain for the first, with its place for the others."""
    further = (
        f"features@{layer}" if site == "resid_post" else f"features@{layer}-{site}"
        for layer, site in recipe.hookpoints[1:]
    )  # fmt: skip
    return ["features", *further]


class StagePlan(NamedTuple):
    """One stage of a run."""

    stage: str
    artifact: str
    version: str
    recipe: dict[str, Any]
    inputs: dict[str, str]
    state: str  # missing, partial or complete

    @property
    def name(self) -> str:
        """``artifact/version``."""
        return f"{self.artifact}/{self.version}"

    @property
    def made_of(self) -> dict[str, Any]:
        """What its version follows from: inputs and settings, by name."""
        return {**self.inputs, **self.recipe}

    @property
    def made_from(self) -> set[str]:
        """The artifacts among its inputs, by ``artifact/version``."""
        return set(input_artifacts(self.inputs).values())


class Plan(NamedTuple):
    """All stages of a run, by name, and the sources that could not be resolved."""

    stages: dict[str, StagePlan]
    unresolved: tuple[str, ...]
    resolved: Mapping[str, Resolved] = {}  # data source -> the files that its version names
    date: TemplateDate | None = None  # None: the template writes no date

    def version(self, stage: str) -> str:
        """The artifact version of a stage."""
        return self.stages[stage].version


def make_plan(recipe: Recipe, store: Store) -> Plan:
    """Work out every stage's version and state.

    Raises:
        FPOError: a model folder, SAE or data file that the recipe names is not there.
    """
    model = identify(recipe.model.source, recipe.model.revision)
    unresolved = [] if model.resolved else [f"model {recipe.model.source}"]
    data = DataSources(unresolved)
    digests = {
        "train": data.digest(source.path for source in recipe.data.train),
        "heldout": data.digest(source.path for source in recipe.data.heldout_sources),
    }
    date = template_date(recipe, store, digest_of([model.value, *digests.values()]))
    dated = {} if date is None else {"date": date.date}
    planner = _Planner(store)
    reference = _warm_start(recipe, planner, model.value, data, dated)
    windows = sae_text_part(recipe, model.commit, dated, unresolved)
    saes = [_sae_input(recipe, planner, reference, data, windows)]
    saes += [_stored_sae(other.source, unresolved) for other in recipe.sae.also]
    _check_features_fit(recipe)
    _check_saes_fit_the_model(recipe)
    part = {**tokenize_part(recipe), **dated}
    planner.add("tokenize", part, {"model": model.value, **digests})
    inference = recipe.model.model_dump(include={"dtype", "attention"})
    inputs = {"model": reference, "pairs": planner["tokenize"]}
    planner.add("reference", inference, inputs)
    caches = {"reference": planner["reference"]}
    for number, stage in enumerate(features_stages(recipe)):
        part = {**_features_part(recipe, number), **inference}
        planner.add(stage, part, {**inputs, "sae": saes[number]})
        caches[stage] = planner[stage] if number == 0 else f"artifact:features/{planner[stage]}"
    attention = {"attention": recipe.model.attention}
    encoders = {stage.replace("features", "sae"): sae for stage, sae in zip(
        features_stages(recipe), saes, strict=True
    )}  # fmt: skip
    planner.add(
        "train", {**_train_part(recipe.train), **attention}, {**inputs, **encoders, **caches}
    )
    add_benchmarks(recipe, reference, planner["train"], store, planner.add, dated)
    questions = evaluation_questions(recipe)
    planner.add(
        "evaluate",
        {
            **recipe.evaluation.model_dump(exclude={"questions"}),
            **({} if questions is None else dated),
            "k": recipe.train.k,
            **attention,
        },
        {
            "policy": planner["train"],
            "sae": saes[0],
            "pairs": planner["tokenize"],
            **{stage: caches[stage] for stage in ("reference", "features")},
            **({} if questions is None else {"questions": questions_digest(questions)}),
        },
    )
    return Plan(planner.stages, tuple(unresolved), data.resolved, date)


class _Planner:
    def __init__(self, store: Store) -> None:
        self.store = store
        self.stages: dict[str, StagePlan] = {}

    def __getitem__(self, stage: str) -> str:
        return self.stages[stage].version

    def add(self, stage: str, recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        artifact = ARTIFACTS[kind_of(stage)]
        schema_version = SCHEMA_VERSIONS[kind_of(stage)]
        version = artifact_version(
            stage=artifact, schema_version=schema_version, recipe=recipe, inputs=inputs
        )
        state = self.store.state(artifact, version)
        self.stages[stage] = StagePlan(stage, artifact, version, dict(recipe), dict(inputs), state)
        return version


def _warm_start(
    recipe: Recipe, planner: _Planner, model: str, data: DataSources, dated: Mapping[str, str]
) -> str:
    """Identity of the reference model: the recipe's own, or what the ``sft`` stage makes of it."""
    settings = recipe.sft
    if settings is None:
        return model
    text = {**instructions_part(recipe, settings), **dated}
    digest = data.digest(source.path for source in settings.data)
    planner.add("instructions", text, {"model": model, "data": digest})
    part = settings.model_dump(include=set(OptimizerSettings.model_fields))
    part |= recipe.model.model_dump(include={"dtype", "attention"})
    planner.add("sft", part, {"model": model, "instructions": planner["instructions"]})
    return f"artifact:sft/{planner['sft']}"


def _sae_input(
    recipe: Recipe,
    planner: _Planner,
    model: str,
    data: DataSources,
    windows: Mapping[str, Any],
) -> str:
    """Identity of the SAE: of its files, or the version of the stage that trains it."""
    if recipe.sae.train is None:
        assert recipe.sae.source is not None
        return _stored_sae(recipe.sae.source, data.unresolved)
    settings = recipe.sae.train.model_dump(exclude={"text"})
    text = data.digest(source.path for source in recipe.sae.train.text)
    planner.add(
        "sae",
        {**settings, **windows, "layer": recipe.sae.layer, "site": recipe.sae.site},
        {"model": model, "text": text},
    )
    return f"artifact:sae/{planner['sae']}"


def _stored_sae(source: str, unresolved: list[str]) -> str:
    identity = identify_sae(source)
    if not identity.resolved:
        unresolved.append(f"sae {source}")
    return identity.value


def _check_saes_fit_the_model(recipe: Recipe) -> None:
    """Refuse a model or an SAE that cannot be used, before a warm start takes its hours.

    Goes by the files' declarations, where the model's configuration is on this machine.

    Raises:
        FPOError: an unknown architecture, an attention that is not the model's, a layer that the
            model does not have, or activations of another width.
    """
    frame = model_frame(recipe.model.source, recipe.model.revision)
    if frame is None:
        return
    architecture_named(frame.kind)
    check_attention(frame.kind, recipe.model.attention)
    sources = (recipe.sae.source, *(other.source for other in recipe.sae.also))
    for source, (layer, site) in zip(sources, recipe.hookpoints, strict=True):
        if frame.layers is not None and layer >= frame.layers and site != "final_norm":
            raise FPOError(
                f"sae.layer={layer}: there is no layer {layer}, the model has layers 0 to "
                f"{frame.layers - 1}"
            )
        width = None if source is None else declared_input_width(source)
        if None not in (width, frame.hidden) and width != frame.hidden:
            raise FPOError(
                f"SAE {source}: it reads activations of width {width} (d_in), the model's hidden "
                f"size is {frame.hidden}; choose an SAE trained on this model"
            )


def _check_features_fit(recipe: Recipe) -> None:
    """Refuse features that an SAE does not have, before anything runs.

    Raises:
        FPOError: a top-k, or a group's feature, beyond the SAE's width.
    """
    for number, source in enumerate((recipe.sae.source, *(s.source for s in recipe.sae.also))):
        width = recipe.sae.train.d_sae if recipe.sae.train and number == 0 else None
        if width is None and source is not None:
            width = declared_width(source)
        if width is None:
            continue
        name = source or "that this recipe trains"
        for key, k in (
            ("train.k", recipe.train.k),
            ("features.tokens_k", recipe.features.tokens_k),
        ):
            if k > width:
                raise FPOError(f"{key}={k}, but the SAE {name} has only {width} features")
        for group in recipe.train.groups if number == 0 else ():
            beyond = [feature for feature in group.features if feature >= width]
            if beyond:
                raise FPOError(
                    f"train.groups, {group.name}: feature {', '.join(map(str, beyond))} is not in "
                    f"the SAE {name}, whose features are 0 to {width - 1}"
                )


def _features_part(recipe: Recipe, number: int) -> dict[str, Any]:
    """The settings of an SAE's cache; the groups' features are pinned in the first one's."""
    pinned = list(recipe.train.pinned) if number == 0 else []
    place = recipe.hookpoints[number]._asdict()
    return {**recipe.features.model_dump(), "pinned": pinned, **place}


def _train_part(settings: TrainSettings) -> dict[str, Any]:
    """The settings with the objective's own filled in: writing a default out changes nothing."""
    options = objective_options(settings)._asdict()
    part = {**settings.model_dump(exclude={*options, "length_norm"}), **options}
    # What a name means enters too: of a redefined objective no old policy is reused.
    return {**part, "parts": METHODS[settings.method].parts}


def selected_stages(
    plan: Plan, first: str | None, only: str | None, kinds: Collection[str] = ()
) -> list[str]:
    """The stages a run is asked to bring about, which can begin.

    Args:
        plan: of the run.
        first: this stage and the later ones.
        only: this stage alone.
        kinds: all stages of these kinds, instead of either.

    Raises:
        UsageError: an unknown stage, or both options at once.
        FPOError: inputs that an earlier stage that is not selected has not made.
    """
    chosen = asked_stages(plan, first, only, kinds)
    option = None if kinds else "--only" if only else "--from"
    _check_inputs(plan, chosen, option)
    return chosen


def asked_stages(
    plan: Plan, first: str | None, only: str | None, kinds: Collection[str] = ()
) -> list[str]:
    """The stages that are asked for, whether they can begin or not; see ``selected_stages``."""
    if first and only:
        raise UsageError("--from and --only cannot be used together")
    stages = list(plan.stages)
    if kinds:
        chosen = [stage for stage in stages if stage in kinds or kind_of(stage) in kinds]
        if not chosen:
            raise FPOError(
                f"this recipe has no stage {' or '.join(sorted(kinds))}; it has {', '.join(stages)}"
            )
        return chosen
    asked = first or only
    if not asked:
        return stages
    if asked not in stages:
        why = ""
        if asked == "sae":
            why = " (this recipe's SAE is a stored one)"
        elif asked.replace("benchmark@", "generate@") in stages:
            why = " (its verdicts need a judge: set judge.model)"
        raise UsageError(f"unknown stage {asked!r}{why}; stages: {', '.join(stages)}")
    return [asked] if only else stages[stages.index(asked) :]


def _check_inputs(plan: Plan, chosen: Sequence[str], option: str | None) -> None:
    """Refuse to begin where what the chosen stages need is not made, nor among them.

    Args:
        plan: of the run.
        chosen: the stages.
        option: that chose them; None where the flow of a stage did.

    Raises:
        FPOError: naming the stage that has to be made before.
    """
    made = set(chosen)
    for stage in chosen:
        for before, planned in plan.stages.items():
            if before in made or planned.state == "complete":
                continue
            if planned.name in plan.stages[stage].made_from:
                remedy = f"run without {option}, or with --from {before}"
                if option is None:
                    remedy = "run fpo-pipeline, or that stage's own flow, before"
                raise FPOError(
                    f"stage {stage!r} needs {planned.name}, which stage {before!r} has not made "
                    f"yet; {remedy}"
                )
