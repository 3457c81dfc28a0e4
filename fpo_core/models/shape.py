"""What a model's ``config.json`` says of its size, without its weights and without torch.

A model that is not on this machine is known here only when the shipped recipes name it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fpo_core.files import read_json_object
from fpo_core.models import source as sources
from fpo_core.models.gguf import converted_folder


class ModelShape(NamedTuple):
    """Sizes of a dense decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = True  # the embedding is the head as well
    gated: bool = True  # the MLP has three matrices; GPT-2's has two

    @property
    def block_params(self) -> int:
        """Parameters of the matrices of one decoder block; norms and biases are left out."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def head_params(self) -> int:
        """Parameters of the language-model head."""
        return self.hidden * self.vocabulary

    @property
    def params(self) -> int:
        """Parameters of the whole model, norms and biases left out."""
        return self.layers * self.block_params + self.head_params * (1 if self.tied else 2)


class ModelFrame(NamedTuple):
    """The facts of a model that an SAE has to fit, of any architecture."""

    kind: str  # model_type of the text decoder
    hidden: int | None
    layers: int | None


# As their config.json on the hub says, for planning without the hub.
PUBLISHED = {
    "google/gemma-2-2b": ModelShape(2304, 26, 8, 4, 256, 9216, 256_000),
    "google/gemma-2-9b": ModelShape(3584, 42, 16, 8, 256, 14336, 256_000),
}


def model_shape(source: str, revision: str | None = None) -> tuple[ModelShape, str] | None:
    """A model's shape and where it is known from; None when neither is to be had here.

    Args:
        source: as a recipe names the model.
        revision: of a model on the hub.
    """
    file = _config_file(source, revision)
    shape = _of_config(read_json_object(file, "model")) if file else None
    if shape:
        return shape, "config.json"
    published = PUBLISHED.get(source)
    return (published, "its published config.json") if published else None


def model_frame(source: str, revision: str | None = None) -> ModelFrame | None:
    """Return a model's frame, or None when its configuration is not on this machine.

    Args:
        source: as a recipe names the model.
        revision: of a model on the hub.
    """
    file = _config_file(source, revision)
    if file is None:
        published = PUBLISHED.get(source)
        return ModelFrame("gemma2", published.hidden, published.layers) if published else None
    config = read_json_object(file, "model")
    kind = str(config.get("model_type"))
    if "text_config" in config:  # a multimodal model; its text decoder is read
        config = config["text_config"]
        kind = config.get("model_type", f"{kind}_text")
    return ModelFrame(
        kind,
        config.get("hidden_size", config.get("n_embd")),
        config.get("num_hidden_layers", config.get("n_layer")),
    )


def _config_file(source: str, revision: str | None) -> Path | None:
    if sources.is_package(source):
        folder = converted_folder(sources.package_file(source), sources.GGUF_CONVERSION)
    elif sources.is_folder(source):
        folder = sources.existing_folder(source)
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        return Path(cached) if isinstance(cached, str) else None
    file = folder / "config.json"
    return file if file.is_file() else None


def _of_config(config: Mapping[str, Any]) -> ModelShape | None:
    """None for what is no dense decoder with the usual names, such as a mixture of experts."""
    config = config.get("text_config", config)
    if any("experts" in key for key in config):
        return None
    if config.get("model_type") == "gpt2":
        width, heads = config["n_embd"], config["n_head"]
        inner = config.get("n_inner") or 4 * width
        return ModelShape(
            width, config["n_layer"], heads, heads, width // heads, inner, config["vocab_size"],
            gated=False,
        )  # fmt: skip
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return ModelShape(
            hidden, config["num_hidden_layers"], heads, config.get("num_key_value_heads") or heads,
            config.get("head_dim") or hidden // heads, config["intermediate_size"],
            config["vocab_size"], bool(config.get("tie_word_embeddings", True)),
        )  # fmt: skip
    except KeyError:
        return None
