"""What the flows take, typed so that Prefect refuses a mistake when a run is submitted.

A deployment keeps these types as a JSON schema; the server checks a run's parameters against it,
and the UI makes its form of it. Recipes are read by the workers, so of an override only the key can
be checked there: by a pattern of all keys that there are.
"""

import re
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from fpo_core.errors import FPOError
from fpo_core.recipe import load_recipe
from fpo_core.recipe.load import override_pattern, shipped_recipes
from tasks.plan import STAGES

_FILE = r".*\.ya?ml"

RecipeName = Annotated[
    str,
    Field(
        title="Recipe",
        description="A shipped recipe's name, or the path of a YAML file as the worker sees it.",
        pattern=f"^({'|'.join(map(re.escape, shipped_recipes()))}|{_FILE})$",
        examples=shipped_recipes(),
    ),
]
Overrides = Annotated[
    list[Annotated[str, Field(pattern=override_pattern())]],
    Field(
        title="Overrides",
        description="Settings on top of the recipe, each key.path=value: train.alpha=1.0",
    ),
]
StageName = Annotated[
    str,
    Field(
        description="A stage's name; a further SAE's features are features@LAYER, a benchmark's "
        "stages generate@NAME and benchmark@NAME.",
        pattern=f"^({'|'.join(STAGES)})(@.+)?$",
        examples=list(STAGES),
    ),
]
Force = Annotated[
    bool,
    Field(
        title="Force",
        description="Compute the selected stages anew, dropping what there is of them, a "
        "training's checkpoints too; else what is done is reused and what was begun goes on.",
    ),
]
StoreUrl = Annotated[
    str | None,
    Field(
        title="Store",
        description="A folder or s3://bucket/prefix; where left out, the worker's FPO_STORE, or "
        "the recipe's.",
    ),
]
ReportFolder = Annotated[
    str | None,
    Field(
        title="Report folder",
        description="Where the report goes on the worker; reports/RECIPE-METHOD where left out.",
    ),
]


def run_name() -> str:
    """A flow run's name: its stage or stages, recipe and method, as in ``features gemma2b fpo``."""
    given: dict[str, Any] = flow_run.parameters
    flow = (flow_run.flow_name or "").removeprefix("fpo-")
    stages = given.get("stages") or ([] if flow in ("pipeline", "") else [flow])
    name = str(given.get("recipe", ""))
    try:
        recipe = load_recipe(name, given.get("overrides") or [])
    except FPOError:  # the run itself is going to say so
        return " ".join([*stages, name])
    return " ".join([*stages, recipe.name, recipe.train.method])
