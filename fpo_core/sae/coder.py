"""A sparse autoencoder for reading features: encode whole, or only some columns with gradient.

Reads the formats of ``fpo_core/sae/formats.py`` directly, since importing sae-lens takes seconds in
every worker; tests hold it equal to sae-lens' own ``encode``.
What an SAE declares is honoured or refused by name, never ignored. Encoding is float32.

Shapes: N tokens, F = d_sae.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.architectures import architecture_of
from fpo_core.models.hooks import hooked_module
from fpo_core.sae.architectures import ARCHITECTURES, Activated
from fpo_core.sae.config import Normalization
from fpo_core.sae.declared import declared_place
from fpo_core.sae.formats import find_files, read_config
from fpo_core.sae.normalize import Normalized, normalized
from fpo_core.sae.weights import read_weights

# Activations held at a time: chunks of tokens get shorter as the SAE gets wider.
CHUNK_ELEMENTS = 1 << 23


class ActiveFeatures(NamedTuple):
    """What fires at some tokens: M activations, token by token, each token's features ascending.

    On the host: it is a thousandth of what an encoder puts out.
    """

    token: np.ndarray  # [M] int64, from 0
    feature: np.ndarray  # [M] int64
    value: np.ndarray  # [M] float32, positive


class SparseCoder(NamedTuple):
    """Weights of an SAE in float32, and its row of ``ARCHITECTURES``."""

    W_enc: Tensor  # [d_in, F]
    b_enc: Tensor  # [F]; zeros where the architecture has none
    threshold: Tensor  # [F]; zeros but for JumpReLU
    W_dec: Tensor | None  # [F, d_in]; None where it is only encoded
    b_dec: Tensor  # [d_in]
    centred: bool  # b_dec is subtracted from the input (apply_b_dec_to_input)
    hook: str  # the hookpoint it declares, "" when it declares none
    k: int | None = None  # TopK: features kept a token
    architecture: str = "jumprelu"
    vectors: Mapping[str, Tensor] = MappingProxyType({})  # [F] what else the architecture has
    normalization: Normalization = "none"  # of each token's activation, before all else
    removes_mean: bool = False  # takes each token's mean over d_in away, before that
    hf_hook: str = ""  # the Hugging Face module path that it declares beside ``hook``
    prepend_bos: bool = False  # it declares that its training text began with a BOS token

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of a number of tokens, each as long as encoding at a time should be; one if 0."""
        size = max(1, CHUNK_ELEMENTS // self.d_sae)
        for start in range(0, max(1, tokens), size):
            yield slice(start, min(start + size, tokens))

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [N, F] of activations [N, d_in]."""
        acts = self._features(x, slice(None))
        if self.k is None:
            return acts
        values, indices = torch.topk(acts, min(self.k, acts.shape[1]), dim=1)
        return torch.zeros_like(acts).scatter(1, indices, values)

    @torch.no_grad()
    def active(self, x: Tensor) -> ActiveFeatures:
        """The features that fire at activations [N, d_in]; N x F is never held."""
        parts = [self._active(x[part], part.start) for part in self.chunks(len(x))]
        return ActiveFeatures(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _active(self, x: Tensor, first: int) -> ActiveFeatures:
        if self.k is None:
            # Values that do not fire are left as they are: setting them to zero is another pass.
            acts, fires = self._activated(x, slice(None))
        else:
            acts = self.encode(x)
            fires = acts > 0
        places = fires.flatten().nonzero().squeeze(1)
        values = acts.flatten()[places]
        token = torch.div(places, self.d_sae, rounding_mode="floor")
        feature = places - token * self.d_sae
        return ActiveFeatures(*(part.cpu().numpy() for part in (token + first, feature, values)))

    def encode_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """Activations [N, m] of the features ``columns`` [m] alone, with gradient to ``x``."""
        acts = self._features(x, columns)
        return acts if self.k is None else acts * self._kept(x, columns)

    def _features(self, x: Tensor, columns: Tensor | slice) -> Tensor:
        """Return each feature alone, before any choice among a token's features."""
        values, fires = self._activated(x, columns)
        # In place, which no gradient minds: a wide SAE's time goes into passes like this.
        return values.mul_(fires)

    def _activated(self, x: Tensor, columns: Tensor | slice) -> Activated:
        """Return what the architecture makes of activations: the only call of its function."""
        vectors = {"b_enc": self.b_enc, "threshold": self.threshold, **self.vectors}
        return ARCHITECTURES[self.architecture].activate(
            self._centre(x),
            self.W_enc[:, columns],
            {name: vector[columns] for name, vector in vectors.items()},
        )

    @torch.no_grad()
    def _kept(self, x: Tensor, columns: Tensor) -> Tensor:
        """Where a TopK SAE keeps the columns: that depends on the token's other features."""
        x = x.detach()
        return torch.cat([self.encode(x[part])[:, columns] > 0 for part in self.chunks(len(x))])

    def decode(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction [N, d_in] of the activations.

        Args:
            acts: [N, F] features.
            x: [N, d_in] what was encoded; an SAE that normalizes each token needs it, to undo that.
        """
        assert self.W_dec is not None, "loaded for encoding only"
        out = acts @ self.W_dec + self.b_dec
        if self.normalization == "none" and not self.removes_mean:
            return out
        assert x is not None, f"undoing {self.normalization} takes the activations themselves"
        undone = self._normalized(x)
        return out * undone.scale + undone.shift

    def _centre(self, x: Tensor) -> Tensor:
        """What the encoder's weights multiply."""
        x = self._normalized(x).values
        return x - self.b_dec if self.centred else x

    def _normalized(self, x: Tensor) -> Normalized:
        return normalized(x.float(), self.normalization, remove_mean=self.removes_mean)

    def to(self, device: str) -> "SparseCoder":
        """The same coder on another device."""
        moved = [part.to(device) if isinstance(part, Tensor) else part for part in self]
        coder = SparseCoder(*moved)  # pyright: ignore[reportArgumentType]
        return coder._replace(vectors={n: vector.to(device) for n, vector in self.vectors.items()})


class AttachedSae(NamedTuple):
    """An SAE and the place whose activations it reads."""

    coder: SparseCoder
    hookpoint: Hookpoint


def load_coder(folder: Path, *, decoder: bool = True) -> SparseCoder:
    """Load an SAE in one of the formats that are read directly.

    Args:
        folder: the SAE's; of Gemma Scope, the file itself serves too.
        decoder: whether to keep the decoder; half of the memory, and training only encodes.

    Raises:
        FPOError: files missing or unreadable, or a declared behaviour that is not supported.
    """
    files = find_files(folder)
    config = read_config(files)
    state = read_weights(files, config, decoder=decoder)
    architecture = ARCHITECTURES[config.architecture]
    vectors = {name: state[name] for name in architecture.vectors}
    zeros = torch.zeros(config.d_sae)
    return SparseCoder(
        state["W_enc"],
        vectors.pop("b_enc", zeros),
        vectors.pop("threshold", zeros),
        state.get("W_dec"),
        state["b_dec"],
        config.centred,
        config.hook,
        k=config.k,
        architecture=config.architecture,
        vectors=vectors,
        normalization=config.normalization,
        removes_mean=config.removes_mean,
        hf_hook=config.hf_hook,
        prepend_bos=config.prepend_bos,
    )


def check_fits(coder: SparseCoder, model: Any, hookpoint: Hookpoint, name: str) -> None:
    """Refuse an SAE that was not made for this place of this model.

    At ``final_norm`` every SAE is out of its place, which who asks for it knows.

    Args:
        coder: the SAE.
        model: the causal LM.
        hookpoint: where the recipe attaches it.
        name: the SAE's, for messages.

    Raises:
        FPOError: no such place in the model, another width, or the SAE declares another place.
    """
    hooked_module(model, hookpoint)
    decoder = model.get_decoder()
    if coder.d_in != decoder.config.hidden_size:
        raise FPOError(
            f"SAE {name}: it reads activations of width {coder.d_in} (d_in), the model's hidden "
            f"size is {decoder.config.hidden_size}; choose an SAE trained on this model"
        )
    if coder.removes_mean and not any(isinstance(m, nn.LayerNorm) for m in decoder.modules()):
        raise FPOError(
            f"SAE {name}: it declares center_writing_weights, which there is for models with "
            f"LayerNorm only; choose an SAE trained on this model"
        )
    if hookpoint.site == "final_norm":
        return
    for hook in filter(None, (coder.hook, coder.hf_hook)):
        _check_hook(hook, model, hookpoint, name)


def _check_hook(hook: str, model: Any, hookpoint: Hookpoint, name: str) -> None:
    declared = declared_place(hook, architecture_of(model))
    asked = f"SAE {name}: it declares the hookpoint {hook!r}, the recipe asks for {hookpoint}"
    if declared is None:
        raise FPOError(
            f"{asked}; in {type(model).__name__} that is neither a block's output (resid_post) nor "
            f"what its MLP adds (mlp_out): choose an SAE of one of these"
        )
    site = declared.site or hookpoint.site
    if declared.layer != hookpoint.layer or site != hookpoint.site:
        raise FPOError(
            f"{asked}; set its layer to {declared.layer} and its site to {site}, or choose another "
            f"SAE"
        )


def check_bos(
    coder: SparseCoder, prompt_ids: Sequence[int], bos_token_id: int | None, name: str
) -> None:
    """Refuse prompts without BOS for an SAE that declares that its training text had it in front.

    Args:
        coder: the SAE.
        prompt_ids: of a pair, as all are templated alike.
        bos_token_id: the tokenizer's; None where it has none, and then there is nothing to check.
        name: the SAE's, for messages.

    Raises:
        FPOError: it does not begin with BOS.
    """
    if not coder.prepend_bos or bos_token_id is None or prompt_ids[0] == bos_token_id:
        return
    raise FPOError(
        f"SAE {name}: it declares prepend_bos, but the prompts begin with token {prompt_ids[0]}, "
        f"not with BOS ({bos_token_id}): it has never seen such activations. Take a chat template "
        f"that writes BOS (data.template=halos does), or an SAE that was trained without it. One "
        f"of before version 6 of sae-lens that says nothing of prepend_bos had it; if this one had "
        f"not, write prepend_bos=false into its cfg.json"
    )
