"""What a feature does to the logits on the straight way: through the decoder and the unembedding.

The feature's decoder row, times the final norm's weight, times each token's row of the unembedding
(the logit lens of Nostalgebraist, 2020, as in SAE dashboards): how much one unit of activation
raises a token's logit where the final norm divides by 1. Layers after the SAE's, and Gemma-2's
cap of the logits, which keeps their order, are left out.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from explorer.cache import FeatureCache
from explorer.errors import NotThere
from explorer.tokenizer import model_at_hand
from fpo_core.errors import FPOError
from fpo_core.models.architectures import architecture_of
from fpo_core.sae.coder import load_coder
from fpo_core.sae.source import identify_sae, sae_folder
from storage.errors import StoreError
from storage.lineage import input_artifacts
from storage.store import Store

ROWS = 16_384  # of the unembedding that are read at a time
TOP = 12


class TokenEffect(NamedTuple):
    """A token, and what a unit of activation adds to its logit."""

    text: str  # with ␣ for its spaces: many tokens differ in nothing else
    effect: float


class LogitEffect(NamedTuple):
    """The tokens whose logits a feature raises and lowers most."""

    raised: tuple[TokenEffect, ...]
    lowered: tuple[TokenEffect, ...]


class LogitLens:
    """The way from a cache's features to the logits; the unembedding stays on the disk.

    Args:
        store: where the SAE is, if it was trained here.
        cache: the features.

    Raises:
        NotThere: model or SAE are not at hand here; nothing is fetched for it.
    """

    def __init__(self, store: Store, cache: FeatureCache) -> None:
        self._cache = cache
        folder = model_at_hand(cache.sae.model) if cache.sae.model else None
        if folder is None:
            raise NotThere("the model of this cache is not on this machine")
        try:
            self._decoder = load_coder(_sae_at_hand(store, cache)).W_dec
            self._weights = _Weights(folder)
            model = _empty_model(folder)
            self._unembedding = _unembedding(model, self._weights)
            self._norm = None
            if cache.sae.site != "final_norm":
                self._norm = _final_norm(model, self._weights)
        except (FPOError, StoreError, OSError, SafetensorError) as error:
            raise NotThere(f"no logits: {str(error).partition(chr(10))[0]}") from error

    def effect(self, feature: int, top: int = TOP) -> LogitEffect:
        """Of one feature.

        Raises:
            NotThere: the SAE has no such feature.
        """
        self._cache.check_feature(feature)
        assert self._decoder is not None
        direction = self._decoder[feature].float()
        if self._norm is not None:
            direction = _through(self._norm, direction)
        logits = torch.cat([
            rows.float() @ direction for rows in self._weights.blocks(self._unembedding)
        ])  # fmt: skip
        strongest = [logits.topk(min(top, len(logits)), largest=large) for large in (True, False)]
        raised, lowered = (
            tuple(
                TokenEffect(self._cache.detokenizer.pieces([token])[0].replace(" ", "␣"), value)
                for value, token in zip(values.tolist(), tokens.tolist(), strict=True)
            )
            for values, tokens in strongest
        )
        return LogitEffect(raised, lowered)


class _Weights:
    """A model folder's safetensors, by the name of the tensor."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        if not self._files:
            raise NotThere(f"{folder.name} has no weights in safetensors")

    def first_of(self, names: list[str]) -> str:
        """The first of these names that there is."""
        for name in names:
            if name in self._files:
                return name
        raise NotThere(f"the model's files have none of {', '.join(names)}")

    def tensor(self, name: str) -> Tensor:
        """A small one."""
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def blocks(self, name: str) -> Any:
        """Rows of a large one, some at a time; no more of the file stays mapped than those."""
        begin, end = 0, 1
        while begin < end:
            with safe_open(self._files[name], "pt") as file:
                part = file.get_slice(name)
                end = part.get_shape()[0]
                yield part[begin : min(begin + ROWS, end)]
            begin += ROWS


def _sae_at_hand(store: Store, cache: FeatureCache) -> Path:
    made = input_artifacts({"sae": cache.sae.identity}).get("sae")
    if made is not None:
        artifact = store.artifact(*made.split("/"))
        if not artifact.is_here("sae"):
            raise NotThere(f"{made} is in the store alone; a run that uses it brings it here")
        return artifact.folder("sae")
    source = cache.sae.source
    if source is None:
        raise NotThere("no record says which SAE this is")
    identity = identify_sae(source)
    if not identity.resolved:
        raise NotThere(f"the SAE {source} is not on this machine")
    if identity.value != cache.sae.identity:
        raise NotThere(f"the SAE that {source} names here is not the one of this cache")
    return sae_folder(source)


def _empty_model(folder: Path) -> Any:
    """The model's modules without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model


def _unembedding(model: Any, weights: _Weights) -> str:
    wanted = model.get_output_embeddings().weight
    return weights.first_of(_saved_as(model, wanted))


def _saved_as(model: Any, wanted: Tensor) -> list[str]:
    """Names that a parameter may have in the files: its own, that it is tied to, without prefix."""
    every = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in every if parameter is wanted]
    prefix = f"{model.base_model_prefix}."
    return [*names, *(name.removeprefix(prefix) for name in names)]


def _final_norm(model: Any, weights: _Weights) -> nn.Module:
    norm = model.get_decoder().get_submodule(architecture_of(model).norm)
    state = {
        name: weights.tensor(weights.first_of(_saved_as(model, parameter))).float()
        for name, parameter in norm.named_parameters()
    }
    norm = norm.to_empty(device="cpu").float()
    norm.load_state_dict(state)
    return norm.eval()


@torch.no_grad()
def _through(norm: nn.Module, direction: Tensor) -> Tensor:
    """A direction times the norm's weight, however the norm writes it (Gemma's is one more).

    What the norm makes of alternating ones, whose mean is 0 and whose variance is 1, is its weight.
    """
    signs = torch.ones_like(direction)
    signs[1::2] = -1
    weight = (norm(signs[None])[0] - norm(-signs[None])[0]) / 2 * signs
    if isinstance(norm, nn.LayerNorm):
        direction = direction - direction.mean()
    return direction * weight
