"""What some SAEs do to each token's activation before they encode it, and how it is undone.

Shapes: N tokens.
"""

from typing import NamedTuple

from torch import Tensor

from fpo_core.sae.config import Normalization

_EPSILON = 1e-5  # sae-lens'


class Normalized(NamedTuple):
    """x = values * scale + shift, but for layer_norm's epsilon, which sae-lens leaves out there."""

    values: Tensor  # [N, d_in]
    scale: Tensor | float  # [N, 1]
    shift: Tensor | float  # [N, 1]


def normalized(x: Tensor, kind: Normalization, *, remove_mean: bool) -> Normalized:
    """Activations [N, d_in] as the SAE reads them, with gradient.

    Args:
        x: the model's activations.
        kind: sae-lens' ``normalize_activations``.
        remove_mean: take each token's mean over d_in away first. That is the residual stream of a
            LayerNorm model whose writing weights TransformerLens has centred.
    """
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    if remove_mean:
        shift = x.mean(-1, keepdim=True)
        x = x - shift
    if kind == "constant_norm_rescale":  # to the norm sqrt(d_in)
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x = x / scale
    elif kind == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        x = x - mean
        scale = x.std(-1, keepdim=True)
        x, shift = x / (scale + _EPSILON), shift + mean
    return Normalized(x, scale, shift)
