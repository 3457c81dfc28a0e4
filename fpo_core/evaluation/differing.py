"""In which settings runs differ: what the rows of a comparison are named by.

The paper's tables name their rows by method (Table 2), by layer and site (Table 3), by alpha and
stop-gradient (Table 6), by the layers of the SAEs (Table 7). Which of them a comparison is follows
from its runs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.options import objective_options
from fpo_core.recipe.training import TrainSettings

Settings = Mapping[str, Any]  # by the recipe's key, "train.alpha"
METHOD = "train.method"
ABSENT = "–"
# As the tables name a setting; others are named by their key.
TITLES = {
    METHOD: "Method", "train.alpha": "α", "train.beta": "β", "train.gamma": "γ", "train.k": "k",
    "train.stop_gradient": "Stop-gradient", "train.seed": "Seed", "train.lr": "Learning rate",
    "train.per_token": "Length normalization", "sae.layer": "Layer", "sae.site": "Site",
    "sae": "SAE", "model": "Model", "reference": "Reference",
}  # fmt: skip


def differing_settings(runs: Sequence[Settings]) -> list[str]:
    """The settings that are not the same in all runs, the method first.

    What an objective has of its own (DPO has no alpha) says no more than its name: such a setting
    counts where a run departs from its method's own value.

    Args:
        runs: each run's settings, by key.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run))
    found = [key for key in keys if len({_canonical(run.get(key)) for run in runs}) > 1]
    if METHOD in found:
        found = [METHOD, *(key for key in found if key != METHOD and _departs(key, runs))]
    return found


def _departs(key: str, runs: Sequence[Settings]) -> bool:
    """Whether a setting of the objective is anywhere not the method's own; True of all others."""
    for run in runs:
        own = _own_options(run.get(METHOD))
        if key not in own or _canonical(run.get(key)) != _canonical(own[key]):
            return True
    return False


def _own_options(method: Any) -> dict[str, Any]:
    if method not in METHODS:  # of a later version of this program
        return {}
    options = objective_options(TrainSettings(method=method))
    return {f"train.{name}": value for name, value in options._asdict().items()}


def title_of(key: str) -> str:
    """How a table names a setting."""
    return TITLES.get(key, key)


def shown(key: str, value: Any) -> str:
    """A setting's value for people; a dash where a run has none."""
    if value is None:
        return ABSENT
    if key == METHOD:
        return str(value).upper()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def run_names(runs: Sequence[Settings], keys: Sequence[str], versions: Sequence[str]) -> list[str]:
    """A short name for each run, no two alike: ``FPO``, ``FPO, α 2``.

    Args:
        runs: each run's settings, by key.
        keys: the settings that tell them apart.
        versions: of their evaluations, for what the settings do not tell apart.
    """
    names = []
    for run in runs:
        parts = [] if METHOD in keys else [shown(METHOD, run.get(METHOD))]
        for key in keys:
            value = shown(key, run.get(key))
            if key == METHOD:
                parts.append(value)
            elif value != ABSENT:
                parts.append(f"{_in_a_sentence(title_of(key))} {value}")
        names.append(", ".join(parts))
    return [
        f"{name} ({version})" if names.count(name) > 1 else name
        for name, version in zip(names, versions, strict=True)
    ]


def _in_a_sentence(title: str) -> str:
    return title if title[1:2].isupper() or len(title) == 1 else title[:1].lower() + title[1:]


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
