"""The objectives by name: which parts each is made of. One table, the paper's Table 1.

Every preference objective is u = log-prob difference - margin - constraint with loss
-log sigmoid(u); ``fpo_core/objectives.py`` has the parts as functions. An objective of your own is
one more entry here, for example FPO against SimPO's constant margin:

    METHODS["fpo_gamma"] = Method(
        "mean", "gamma", "features", held=True, beta=2.0, gamma=0.5, alpha=0.5
    )

and then ``train.method=fpo_gamma``. Torch-free: recipes are read and planned without it.
"""

from typing import Literal, NamedTuple


class Method(NamedTuple):
    """The parts of an objective, and its papers' values; None where it has no such part."""

    difference: (
        Literal["sum", "mean"] | None
    )  # summed log-probs S, or A = S / n; None: no pair loss
    margin: Literal["reference", "gamma"] | None = None
    constraint: Literal["kl", "features"] | None = None
    held: bool = False  # stop-gradient on the chosen side's divergence
    beta: float = 0.1
    gamma: float | None = None
    alpha: float | None = None  # weight of the constraint; None with a constraint: 1

    @property
    def parts(self) -> dict[str, str | None]:
        """Return what the objective is made of, without the numbers that a recipe can set."""
        numbers = ("held", "beta", "gamma", "alpha")
        return {name: part for name, part in self._asdict().items() if name not in numbers}

    @property
    def needs_reference_model(self) -> bool:
        """Whether training has to hold a live reference (for the KL); the others use caches."""
        return self.constraint == "kl"


METHODS: dict[str, Method] = {
    "fpo": Method("mean", "reference", "features", held=True, alpha=0.5),
    "dpo": Method("sum", "reference"),
    "simpo": Method("mean", "gamma", beta=2.0, gamma=0.5),
    "tdpo1": Method("sum", "reference", "kl"),
    "tdpo2": Method("sum", "reference", "kl", held=True, alpha=0.5),
    "simpo_kl": Method("mean", "gamma", "kl", held=True, beta=2.0, gamma=0.5, alpha=0.5),
    "sft": Method(None),
}
