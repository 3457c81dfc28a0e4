"""A sparse autoencoder for reading features: encode whole, or only some columns with gradient.

Reads sae-lens' disk format (``cfg.json`` and ``sae_weights.safetensors``) and Gemma Scope's
(``params.npz``) directly, since importing sae-lens takes seconds in every worker; tests hold it
equal to sae-lens' own ``encode``.
What an SAE declares is honoured or refused by name, never ignored. Encoding is float32.

Shapes: N tokens, F = d_sae.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpo_core.errors import FPOError
from fpo_core.hookpoint import Hookpoint
from fpo_core.sae.gemma_scope import declared_hook, read_arrays
from fpo_core.sae.source import WEIGHTS_FILE, params_file, read_config

# A BatchTopK SAE is stored as the JumpReLU that it is at inference.
ARCHITECTURES = ("standard", "jumprelu", "topk", "gated")
# Activations held at a time: chunks of tokens get shorter as the SAE gets wider.
CHUNK_ELEMENTS = 1 << 23


class Gate(NamedTuple):
    """What a gated SAE has beside the weights: a feature is on where x W + bias is positive."""

    bias: Tensor  # [F] b_gate
    scale: Tensor  # [F] exp(r_mag): of the shared weights in the magnitude path


class ActiveFeatures(NamedTuple):
    """What fires at some tokens: M activations, token by token, each token's features ascending.

    On the host: it is a thousandth of what an encoder puts out.
    """

    token: np.ndarray  # [M] int64, from 0
    feature: np.ndarray  # [M] int64
    value: np.ndarray  # [M] float32, positive


class SparseCoder(NamedTuple):
    """Weights of a ReLU (``standard``), JumpReLU, TopK or gated SAE, in float32."""

    W_enc: Tensor  # [d_in, F]
    b_enc: Tensor  # [F]; b_mag of a gated one
    threshold: Tensor  # [F]; zeros but for JumpReLU
    W_dec: Tensor | None  # [F, d_in]; None where it is only encoded
    b_dec: Tensor  # [d_in]
    centred: bool  # b_dec is subtracted from the input (apply_b_dec_to_input)
    hook: str  # the hookpoint it declares, "" when it declares none
    k: int | None = None  # TopK: features kept a token
    gate: Gate | None = None  # gated only

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of a number of tokens, each as long as encoding at a time should be."""
        size = max(1, CHUNK_ELEMENTS // self.d_sae)
        for start in range(0, tokens, size):
            yield slice(start, min(start + size, tokens))

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [N, F] of activations [N, d_in]."""
        acts = self._activate(self._centre(x), slice(None))
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
        if self.k is None and self.gate is None:
            # What is below the threshold is left where it is: to zero it would be another pass.
            acts = torch.addmm(self.b_enc, self._centre(x), self.W_enc)
            fires = acts > self.threshold.clamp_min(0.0)
        else:
            acts = self.encode(x)
            fires = acts > 0
        places = fires.flatten().nonzero().squeeze(1)
        values = acts.flatten()[places].cpu().numpy()
        token, feature = np.divmod(places.cpu().numpy(), self.d_sae)
        return ActiveFeatures(token + first, feature, values)

    def encode_columns(self, x: Tensor, columns: Tensor) -> Tensor:
        """Activations [N, m] of the features ``columns`` [m] alone, with gradient to ``x``."""
        acts = self._activate(self._centre(x), columns)
        return acts if self.k is None else acts * self._kept(x, columns)

    def _activate(self, centred: Tensor, columns: Tensor | slice) -> Tensor:
        """Each feature by itself, before any choice among a token's features."""
        weight = self.W_enc[:, columns]
        if self.gate is None:
            pre_acts = torch.addmm(self.b_enc[columns], centred, weight)
            # In place, which no gradient minds: a wide SAE's time goes into passes like this.
            return pre_acts.mul_(pre_acts.detach() > self.threshold[columns].clamp_min(0.0))
        projected = centred @ weight
        magnitude = projected * self.gate.scale[columns] + self.b_enc[columns]
        return torch.where(projected + self.gate.bias[columns] > 0, magnitude, 0.0).clamp_min(0.0)

    @torch.no_grad()
    def _kept(self, x: Tensor, columns: Tensor) -> Tensor:
        """Where a TopK SAE keeps the columns: that depends on the token's other features."""
        x = x.detach()
        return torch.cat([self.encode(x[part])[:, columns] > 0 for part in self.chunks(len(x))])

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction [N, d_in] of the activations."""
        assert self.W_dec is not None, "loaded for encoding only"
        return acts @ self.W_dec + self.b_dec

    def _centre(self, x: Tensor) -> Tensor:
        x = x.float()
        return x - self.b_dec if self.centred else x

    def to(self, device: str) -> "SparseCoder":
        """The same coder on another device."""
        moved = [part.to(device) if isinstance(part, Tensor) else part for part in self]
        coder = SparseCoder(*moved)  # pyright: ignore[reportArgumentType]
        if self.gate is None:
            return coder
        return coder._replace(gate=Gate(*(part.to(device) for part in self.gate)))


class AttachedSae(NamedTuple):
    """An SAE and the place whose activations it reads."""

    coder: SparseCoder
    hookpoint: Hookpoint


def load_coder(folder: Path, *, decoder: bool = True) -> SparseCoder:
    """Load an SAE in sae-lens' disk format or in Gemma Scope's.

    Args:
        folder: the SAE's; of Gemma Scope, the file itself serves too.
        decoder: whether to keep the decoder; half of the memory, and training only encodes.

    Raises:
        FPOError: files missing or unreadable, or a declared behaviour that is not supported.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    params = params_file(folder)
    if params:
        return _gemma_scope_coder(params, decoder)
    config = read_config(folder)
    _refuse_unsupported(config, folder)
    try:
        state = {name: value.float() for name, value in load_file(folder / WEIGHTS_FILE).items()}
    except (FileNotFoundError, SafetensorError) as error:
        raise FPOError(f"SAE {folder}: {WEIGHTS_FILE} is missing or damaged ({error})") from error
    gated = config.get("architecture") == "gated"
    try:
        bias = state["b_mag"] if gated else state["b_enc"]
        coder = SparseCoder(
            state["W_enc"], bias, state.get("threshold", torch.zeros_like(bias)),
            state["W_dec"] if decoder else None, state["b_dec"],
            bool(config.get("apply_b_dec_to_input", True)),
            str((config.get("metadata") or {}).get("hook_name") or ""),
            k=int(config["k"]) if config.get("architecture") == "topk" else None,
            gate=Gate(state["b_gate"], state["r_mag"].exp()) if gated else None,
        )  # fmt: skip
    except KeyError as error:
        raise FPOError(
            f"SAE {folder}: {error} is missing for the architecture "
            f"{config.get('architecture', 'standard')!r}"
        ) from error
    declared = (config["d_in"], config["d_sae"])
    if tuple(coder.W_enc.shape) != declared:
        raise FPOError(
            f"SAE {folder}: weights are {tuple(coder.W_enc.shape)}, cfg.json says {declared}"
        )
    return coder


def _gemma_scope_coder(file: Path, decoder: bool) -> SparseCoder:
    arrays = read_arrays(file, decoder=decoder)
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return SparseCoder(
        state["W_enc"], state["b_enc"], state["threshold"], state.get("W_dec"), state["b_dec"],
        centred=False, hook=declared_hook(file),
    )  # fmt: skip


def _refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    architecture = config.get("architecture", "standard")
    if architecture not in ARCHITECTURES:
        raise FPOError(
            f"SAE {folder}: architecture {architecture!r} is not supported yet; supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    if config.get("rescale_acts_by_decoder_norm"):
        raise FPOError(
            f"SAE {folder}: rescale_acts_by_decoder_norm=true is not supported; fold the decoder's "
            f"norms into the weights"
        )
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") not in ("none", None):
            raise FPOError(
                f"SAE {folder}: {key}={config[key]!r} is not supported; fold it into the weights"
            )


def check_fits(coder: SparseCoder, hidden_size: int, hookpoint: Hookpoint, name: str) -> None:
    """Refuse an SAE that was not made for this place of this model.

    At ``final_norm`` every SAE is out of its place, which who asks for it knows.

    Raises:
        FPOError: d_in differs from the model's hidden size, or the SAE declares another hookpoint.
    """
    if coder.d_in != hidden_size:
        raise FPOError(
            f"SAE {name}: it reads activations of width {coder.d_in} (d_in), the model's hidden "
            f"size is {hidden_size}; choose an SAE trained on this model"
        )
    expected = f"blocks.{hookpoint.layer}.hook_resid_post"
    # Gemma Scope's paths may say the layer alone.
    fitting = ("", expected, f"blocks.{hookpoint.layer}")
    if coder.hook not in fitting and hookpoint.site != "final_norm":
        raise FPOError(
            f"SAE {name}: it declares the hookpoint {coder.hook!r}, the recipe asks for "
            f"{hookpoint} ({expected!r}); set its layer to the SAE's own"
        )
