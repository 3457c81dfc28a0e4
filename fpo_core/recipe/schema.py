"""The settings of a recipe. Frozen; an unknown key is an error; equal recipes have equal digests.

Nothing derived, dated or random lives here. Settings that do not change a stage's result
(threads, batch sizes of inference passes) are under ``resources`` and never enter a version.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fpo_core.hookpoint import Hookpoint, Site
from fpo_core.recipe.base import Count, NonNegative, Positive, Seed, Settings
from fpo_core.recipe.benchmarks import BenchmarkSettings
from fpo_core.recipe.data import DataSettings
from fpo_core.recipe.generation import GenerationSettings
from fpo_core.recipe.judge import JudgeSettings
from fpo_core.recipe.training import SftSettings, TrainSettings


class ModelSettings(Settings):
    """The language model that is both reference and starting point of the policy."""

    source: str = Field(description="hub id, model folder, or package:NAME/FILE.gguf")
    revision: str | None = Field(default=None, description="hub revision (branch, tag or commit)")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of the inference passes; training keeps float32 masters",
    )
    attention: Literal["eager", "sdpa"] = Field(
        default="sdpa", description="attention implementation; Gemma-2 soft-caps its logits: eager"
    )


class SaeTextSettings(Settings):
    """One source of text that an SAE is trained on."""

    path: str = Field(description="file or hub split, as in data.train")
    kind: Literal["text", "instruction", "preference", "arena"] = Field(
        description="`text` rows, instruction/input/output or messages rows, preference pairs, or "
        "Arena-Hard answers; all but `text` are rendered with data.template"
    )


class SaeTrainSettings(Settings):
    """How to train an SAE where none is published (batch-top-k, saved as JumpReLU).

    At ``sae.layer`` and ``sae.site``; it saves itself every ``resources.checkpoint_minutes``.
    """

    text: tuple[SaeTextSettings, ...] = Field(description="training text")
    context_length: Annotated[int, Field(ge=2)] = Field(
        default=256,
        description="tokens a training window, BOS included where the chat template writes it; the "
        "first one is not trained on",
    )
    max_tokens: Count = Field(
        default=1_000_000, description="most tokens whose activations are collected"
    )
    heldout_share: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        default=0.04, description="share of the windows kept out, for the quality report"
    )
    d_sae: Count = Field(description="dictionary size")
    k: Positive = Field(description="mean active features a token while training")
    steps: Count = Field(description="optimizer steps")
    batch_tokens: Count = Field(default=4096, description="activations a step")
    lr: Positive = Field(description="peak learning rate, decayed to zero over the last fifth")
    warmup_steps: int = Field(default=200, ge=0, description="linear warm-up")
    seed: Seed = Field(default=0, description="order of activations and initial weights")


Offload = Literal["none", "optimizer", "all"]
Layer = Annotated[int, Field(ge=0)]


class AttachedSaeSettings(Settings):
    """One more SAE that is held, at another place."""

    source: str = Field(description="as of sae.source")
    layer: Layer = Field(description="decoder block, from 0")
    site: Site = Field(default="resid_post", description="hookpoint, as of sae.site")

    @property
    def hookpoint(self) -> Hookpoint:
        """Where it reads."""
        return Hookpoint(self.layer, self.site)


class SaeSettings(Settings):
    """The sparse autoencoder: a stored one (`source`) or one to train (`train`)."""

    source: str | None = Field(
        default=None,
        description="folder in the format of sae-lens, sparsify or Gemma Scope (its params.npz "
        "serves too), release:sae_id of sae-lens' directory, or OWNER/NAME:FOLDER of the hub",
    )
    train: SaeTrainSettings | None = Field(default=None, description="train one in the `sae` stage")
    layer: Layer = Field(description="decoder block, from 0")
    site: Site = Field(
        default="resid_post",
        description="hookpoint: the block's output; `mlp_out`, what its MLP adds to the residual "
        "stream; `final_norm` is the last hidden state after the final norm, which the authors' "
        "code encodes and no such SAE was trained on",
    )
    gate: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="what becomes of an SAE whose figures say that it is not in its place: the "
        "stage stops, or goes on with a warning; at `final_norm` it always goes on",
    )
    also: tuple[AttachedSaeSettings, ...] = Field(
        default=(),
        description="SAEs at further layers, whose discrepancies are added to the first one's; "
        "evaluation and the report show the first one's features",
    )

    @property
    def hookpoint(self) -> Hookpoint:
        """Where it reads."""
        return Hookpoint(self.layer, self.site)

    @model_validator(mode="after")
    def _one_origin(self) -> "SaeSettings":
        if (self.source is None) == (self.train is None):
            raise ValueError("give exactly one of sae.source and sae.train")
        if self.train is not None and self.site == "final_norm":
            raise ValueError("sae.train trains at resid_post or mlp_out; nothing is at final_norm")
        places = [self.hookpoint, *(other.hookpoint for other in self.also)]
        # After the final norm there is one place, whatever layer the SAE is of.
        distinct = {p.site if p.site == "final_norm" else p for p in places}
        if len(distinct) < len(places):
            raise ValueError(f"two SAEs at one place: {', '.join(map(str, sorted(places)))}")
        return self


class FeatureSettings(Settings):
    """What of the reference's features is cached."""

    cache_k: Count | Literal["all"] = Field(
        default=256,
        description="pooled features stored a response; `all` keeps every one that fires, so that "
        "no index of the policy's top-k is missing",
    )
    tokens_k: Count = Field(
        default=32,
        description="features stored a token, for browsing and for train.pooled=false",
    )
    tokens_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=1.0,
        description="share of the scored tokens with a row in the token table, drawn by pair, side "
        "and position; pooled values and statistics are over all of them",
    )
    examples: Annotated[int, Field(ge=0)] = Field(
        default=10, description="top examples stored a feature"
    )


class EvaluationSettings(Settings):
    """Held-out metrics and sampled answers."""

    prompts: Annotated[int, Field(ge=0)] = Field(
        default=12, description="prompts answered, the first ones"
    )
    questions: str | None = Field(
        default=None,
        description="pack whose questions are answered instead of the held-out prompts, by name or "
        "folder; the paper's entropy is of 100 of AlpacaEval's",
    )
    max_new_tokens: Count = Field(default=64, description="longest sampled answer")
    temperature: NonNegative = Field(default=0.7, description="0 is greedy")
    bootstrap: Count = Field(default=2000, description="bootstrap resamples for the intervals")
    seed: Seed = 0


class MonitorSettings(Settings):
    """What is measured and shown while the policy trains; it does not change the policy."""

    heldout_steps: Annotated[int, Field(ge=0)] = Field(
        default=100,
        description="steps from one measurement on held-out pairs to the next, beside those before "
        "the first step and after the last; 0: none at all",
    )
    heldout_pairs: Count = Field(
        default=64, description="held-out pairs measured on, the first ones of the split"
    )
    tensorboard: bool = Field(
        default=True, description="write TensorBoard event files, and keep them with the policy"
    )
    wandb: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Weights & Biases project that the figures are sent to"
    )


class InferenceSettings(Settings):
    """How the reference and features stages go over the pairs."""

    tokens_per_batch: Count | Literal["auto"] = Field(
        default="auto",
        description="tokens a forward pass, padding included; `auto`: what the GPU's free memory "
        "holds, 2,048 on a CPU",
    )
    runner: Literal["local", "ray"] = Field(
        default="local", description="where shards are computed: in this process, or on Ray"
    )
    address: Annotated[str, Field(pattern=r"^(ray://)?[^\s/:]+:\d+$")] | None = Field(
        default=None,
        description="of a running Ray cluster, HOST:PORT or ray://HOST:PORT; default: one is "
        "started on this machine for the stage",
    )
    workers: Count | None = Field(
        default=None,
        description="shards computed at a time; default: what the cluster has room for",
    )
    cpus: Positive = Field(default=1, description="CPUs that Ray sets aside for a shard")
    gpus: NonNegative | None = Field(
        default=None,
        description="GPUs that Ray sets aside for a shard, 0: the CPU computes it; default: 1 "
        "where the cluster has any",
    )

    @model_validator(mode="after")
    def _cluster_is_rays(self) -> "InferenceSettings":
        given = self.model_fields_set & {"address", "workers", "cpus", "gpus"}
        if self.runner == "local" and given:
            raise ValueError(
                f"resources.inference.{min(given)} is for resources.inference.runner=ray"
            )
        return self


class PoolSettings(Settings):
    """Prefect work pools that a deployed ``fpo-pipeline`` hands its stages to."""

    cpu: str = Field(default="fpo-cpu", min_length=1, description="of the stages that need no GPU")
    gpu: str = Field(default="fpo-h100", min_length=1, description="of those that use one")


class ResourceSettings(Settings):
    """How the work is done; changes speed and memory, not the result."""

    threads: Count | None = Field(
        default=None, description="CPU threads of a process; default: all cores, which ranks share"
    )
    tokens_per_batch: Count = Field(
        default=1024,
        description="tokens a micro-batch of training or a forward pass of evaluation, padding "
        "included",
    )
    inference: InferenceSettings = Field(
        default=InferenceSettings(), description="of the reference and features stages"
    )
    generation_tokens: Count | Literal["auto"] = Field(
        default="auto",
        description="tokens held while answers are generated, prompts and padding included; "
        "`auto`: what half of the GPU's free memory holds, 32,768 on a CPU",
    )
    generation_requests: Count = Field(
        default=16, description="requests in flight to an endpoint that generates answers"
    )
    ranks: Count | None = Field(
        default=None,
        description="training worker processes; default: 1, or as many as the hostfile has slots",
    )
    hostfile: str | None = Field(
        default=None,
        description="train on several hosts: a file with a line `HOST slots=RANKS` for each",
    )
    master_addr: str | None = Field(
        default=None, description="with a hostfile: address of its first host, as the others see it"
    )
    master_port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        default=None,
        description="with a hostfile: port of its first host where ranks meet; default: a free one",
    )
    offload: Offload = Field(
        default="none",
        description="keep the masters and the optimizer's state in the CPU's memory (`optimizer`, "
        "ZeRO 1 to 3), or the parameters too (`all`, ZeRO 3)",
    )
    checkpoint_minutes: NonNegative = Field(
        default=10, description="training saves itself this often, at a step's end; 0: every step"
    )
    checkpoints_kept: Count = Field(default=2, description="newest checkpoints kept while training")
    pools: PoolSettings | None = Field(
        default=None,
        description="work pools that a deployed run hands its stages to, by the deployments "
        "fpo-stages/POOL; default, and in `fpo run`: all stages where the run is",
    )

    @model_validator(mode="after")
    def _meeting_place_of_hosts(self) -> "ResourceSettings":
        for name in ("master_addr", "master_port"):
            if self.hostfile is None and getattr(self, name) is not None:
                raise ValueError(
                    f"resources.{name} is for several hosts (resources.hostfile); on one machine "
                    f"the ranks meet at a free port"
                )
        return self


class StoreSettings(Settings):
    """Where artifacts are kept; what is left out comes from the environment."""

    url: str | None = Field(
        default=None,
        description="a folder or s3://bucket/prefix; --store and FPO_STORE come before it",
    )
    endpoint: str | None = Field(
        default=None, description="address of an S3 service other than AWS; AWS_ENDPOINT_URL"
    )
    region: str | None = Field(default=None, description="S3 region; AWS_REGION")


class Recipe(Settings):
    """Everything one pipeline run needs to know."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
    description: str = ""
    model: ModelSettings
    data: DataSettings
    sft: SftSettings | None = Field(
        default=None, description="a supervised warm start, before everything else"
    )
    sae: SaeSettings
    features: FeatureSettings = FeatureSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    benchmarks: tuple[BenchmarkSettings, ...] = Field(
        default=(), description="whose questions the policy answers, and is scored on"
    )
    generation: GenerationSettings = Field(
        default=GenerationSettings(), description="how benchmarks' questions are answered"
    )
    judge: JudgeSettings | None = Field(
        default=None, description="who judges answers; without one there are no win rates"
    )
    monitor: MonitorSettings = MonitorSettings()
    resources: ResourceSettings = ResourceSettings()
    store: StoreSettings = StoreSettings()

    @model_validator(mode="after")
    def _top_k_is_cached(self) -> "Recipe":
        k, features = self.train.k, self.features
        # Rounding moves features across the edge of a top-k: past the cache's own they would read
        # as 0. Twice k keeps the two edges apart.
        if features.cache_k != "all" and features.cache_k < 2 * k:
            raise ValueError(
                f"train.k={k} needs a cache of twice as many features, features.cache_k stores "
                f"{features.cache_k}; raise features.cache_k, to `all` if you like"
            )
        if not self.train.pooled and k > features.tokens_k:
            raise ValueError(
                f"train.pooled=false compares the top {k} features of every token (train.k), "
                f"features.tokens_k stores {features.tokens_k}; raise features.tokens_k"
            )
        if not self.train.pooled and features.tokens_share < 1:
            raise ValueError(
                f"train.pooled=false needs every token's features, features.tokens_share="
                f"{features.tokens_share:g} stores some; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _offload_fits_the_stage(self) -> "Recipe":
        offload = self.resources.offload
        allowed = {"none": (0, 1, 2, 3), "optimizer": (1, 2, 3), "all": (3,)}[offload]
        for section, settings in (("sft", self.sft), ("train", self.train)):
            if settings and settings.zero_stage not in allowed:
                raise ValueError(
                    f"resources.offload={offload} takes {section}.zero_stage="
                    f"{' or '.join(map(str, allowed))}, it is {settings.zero_stage}: DeepSpeed "
                    f"moves what ZeRO has partitioned"
                )
        return self

    @property
    def hookpoints(self) -> tuple[Hookpoint, ...]:
        """Where the SAEs read, the first one first."""
        return (self.sae.hookpoint, *(other.hookpoint for other in self.sae.also))
