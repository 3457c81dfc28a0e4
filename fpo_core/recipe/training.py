"""The sections of a recipe that say how a model is trained: ``train`` and ``sft``."""

import difflib
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fpo_core.recipe.base import Count, NonNegative, Positive, Seed, Settings
from fpo_core.recipe.data import Sources, TextSettings, one_source, some_source
from fpo_core.recipe.methods import METHODS

ZeroStage = Literal[0, 1, 2, 3]


class GroupSettings(Settings):
    """A group of features that the constraint holds near the reference's (Section 5.3)."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)] = Field(
        description="as the training metrics name it"
    )
    features: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        min_length=1, description="indices in the (first) SAE; their reference values are cached"
    )
    weight: NonNegative = Field(
        default=1.0, description="of the group's mean squared change in D; 0 measures it only"
    )

    @field_validator("features")
    @classmethod
    def _each_once(cls, features: tuple[int, ...]) -> tuple[int, ...]:
        twice = sorted({feature for feature in features if features.count(feature) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(map(str, twice))}")
        return features


class OptimizerSettings(Settings):
    """What every training has: learning rate, batches, optimizer and its sharding."""

    lr: Positive = Field(description="peak learning rate")
    warmup_steps: int = Field(default=150, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="learning rate after the warm-up; the others end at 0"
    )
    epochs: Count = 1
    batch_size: Count = Field(
        default=32, description="pairs (or dialogues) an optimizer step, over all ranks"
    )
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adam"
    max_grad_norm: Positive = Field(default=10.0, description="gradient clipping")
    activation_checkpointing: bool = False
    zero_stage: ZeroStage = Field(default=0, description="DeepSpeed ZeRO stage")
    seed: Seed = Field(default=0, description="data order")
    bucket_batches: Count = Field(
        default=8,
        description="batches that are drawn together and dealt by length, which saves padding; 1 "
        "draws each at random",
    )
    window_shards: Count = Field(
        default=16, description="shards that are shuffled together; two such windows are in memory"
    )


class SftSettings(OptimizerSettings, TextSettings):
    """A supervised warm start: the model it makes is reference and starting point of the policy."""

    data: Sources = Field(
        description="sources of dialogues (`messages`, `conversations`), instructions "
        "(instruction/input/output), prompt and completion, or preference pairs, whose chosen side "
        "is learnt; paths, or {path, weight, limit, columns}",
    )
    limit: Count | None = Field(default=None, description="use at most this many dialogues")
    turns: Literal["last", "all"] = Field(
        default="last", description="which answers of a dialogue are learnt, each as one example"
    )
    max_prompt_length: Count | None = Field(
        default=1536, description="longest prompt, in tokens; null: no limit but max_length"
    )
    lr: Positive = Field(default=2e-5, description="peak learning rate")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="learning rate after the warm-up"
    )

    _one_source = field_validator("data", mode="before")(one_source)
    _not_empty = field_validator("data")(some_source)


class TrainSettings(OptimizerSettings):
    """The preference-optimization run."""

    method: str = Field(default="fpo", description=f"objective: {', '.join(METHODS)}")
    beta: Positive | None = Field(
        default=None, description="default: the objective's own, 0.1 (with SimPO's margin: 2.0)"
    )
    gamma: NonNegative | None = Field(
        default=None, description="SimPO's target margin; default 0.5"
    )
    alpha: NonNegative | None = Field(
        default=None, description="weight of the constraint; default 0.5"
    )
    stop_gradient: bool | None = Field(
        default=None, description="stop-gradient on the chosen divergence; default: all but tdpo1"
    )
    length_norm: bool | None = Field(
        default=None, description="average log-probs over tokens; default: the objective's own"
    )
    k: Count = Field(default=50, description="features of the discrepancy (top-k of each side)")
    index_set: Literal["union", "policy", "reference"] = Field(
        default="union",
        description="whose top-k the discrepancy is over: of both (Eq. 10), or of one (`policy` is "
        "what the authors' code does)",
    )
    pooled: bool = Field(
        default=True,
        description="the discrepancy of mean activations (Eq. 10); false: of each token's, "
        "averaged over the response, from the features/tokens cache",
    )
    groups: tuple[GroupSettings, ...] = Field(
        default=(), description="feature groups that the constraint also holds, with weights"
    )
    lr: Positive = Field(default=5e-7, description="peak learning rate")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"unknown objective{hint} Objectives: {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _only_the_methods_own(self) -> "TrainSettings":
        method = METHODS[self.method]
        if self.alpha is not None and method.alpha is None:
            having = ", ".join(name for name, other in METHODS.items() if other.alpha is not None)
            raise ValueError(
                f"train.alpha weighs the constraint, and {self.method} has none to weigh; leave it "
                f"out, or set train.method to one of {having}"
            )
        if self.gamma is not None and method.gamma is None:
            raise ValueError(f"train.gamma is SimPO's target margin; {self.method} has none")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"train.groups: a name is used twice: {', '.join(names)}")
        if method.constraint != "features" and any(group.weight for group in self.groups):
            having = [n for n, other in METHODS.items() if other.constraint == "features"]
            raise ValueError(
                f"train.groups weigh features in the constraint, and {self.method} constrains "
                f"none; set their weight to 0 to measure them only, or train.method to "
                f"{' or '.join(having)}"
            )
        return self

    @property
    def group_features(self) -> dict[str, tuple[int, ...]]:
        """The groups' features, by the group's name."""
        return {group.name: group.features for group in self.groups}

    @property
    def pinned(self) -> tuple[int, ...]:
        """The groups' features, each once, ascending: the cache holds all their values."""
        return tuple(sorted({feature for group in self.groups for feature in group.features}))
