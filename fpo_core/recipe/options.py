"""An objective's numbers: what a recipe gives, and the objective's own where it gives none."""

from typing import NamedTuple, TypeVar

from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.training import TrainSettings

T = TypeVar("T")


class Options(NamedTuple):
    """An objective's numbers, all filled in; None where it has no such part."""

    beta: float
    gamma: float | None
    alpha: float | None
    stop_gradient: bool
    per_token: bool  # length normalisation: A instead of S


def objective_options(settings: TrainSettings) -> Options:
    """The numbers that a run trains with."""
    method = METHODS[settings.method]
    return Options(
        beta=_given(settings.beta, method.beta),
        gamma=_given(settings.gamma, method.gamma),
        alpha=_given(settings.alpha, method.alpha),
        stop_gradient=method.constraint is not None and _given(settings.stop_gradient, method.held),
        per_token=_given(settings.length_norm, method.difference == "mean"),
    )


def _given(value: T | None, own: T) -> T:
    return own if value is None else value
