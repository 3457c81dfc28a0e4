"""SAE architectures: the one table of their tensors and activation functions.

One row here adds an architecture that activates each feature alone. Reading, encoding, columns and
sparse encoding all follow the table. A choice among a token's features (TopK) comes after it.

No torch is imported here: planning reads configurations only.

Shapes: N tokens, F = d_sae, m features.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    Vectors = dict[str, Tensor]  # [m] by name, the features' own

_COMMON = ("W_enc", "W_dec", "b_dec")


class Activated(NamedTuple):
    """Feature activations before those that do not fire are set to zero."""

    values: "Tensor"  # [N, m], a tensor of its own: the caller may change it in place
    fires: "Tensor"  # [N, m] bool; the value is positive there


class Architecture(NamedTuple):
    """What one architecture stores and computes."""

    vectors: tuple[str, ...]  # names of the tensors [F] in the file
    # From activations [N, d_in] as the encoder reads them, W_enc [d_in, m] and the vectors.
    activate: "Callable[[Tensor, Tensor, Vectors], Activated]"

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors in the file, ``W_enc`` first."""
        return (*_COMMON, *self.vectors)


def _relu(x: "Tensor", weight: "Tensor", vectors: "Vectors") -> Activated:
    pre_acts = vectors["b_enc"].addmm(x, weight)
    return Activated(pre_acts, pre_acts.detach() > 0)


def _jumprelu(x: "Tensor", weight: "Tensor", vectors: "Vectors") -> Activated:
    pre_acts = vectors["b_enc"].addmm(x, weight)
    return Activated(pre_acts, pre_acts.detach() > vectors["threshold"].clamp_min(0.0))


def _gated(x: "Tensor", weight: "Tensor", vectors: "Vectors") -> Activated:
    """Share the weights between a gate and a magnitude."""
    projected = x @ weight
    magnitude = projected * vectors["r_mag"].exp() + vectors["b_mag"]
    is_on = projected.detach() + vectors["b_gate"] > 0
    return Activated(magnitude, is_on & (magnitude.detach() > 0))


# A BatchTopK or Matryoshka SAE is stored as the JumpReLU that it is at inference.
ARCHITECTURES: dict[str, Architecture] = {
    "standard": Architecture(("b_enc",), _relu),
    "jumprelu": Architecture(("b_enc", "threshold"), _jumprelu),
    "topk": Architecture(("b_enc",), _relu),
    "gated": Architecture(("b_mag", "b_gate", "r_mag"), _gated),
}
