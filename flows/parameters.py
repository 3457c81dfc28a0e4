"""What the flows take, typed so that Prefect refuses a mistake when a run is submitted.

A deployment keeps these types as a JSON schema. The server checks a run's parameters against it,
and the UI makes its form of it. A schema cannot say "did you mean", so overrides are read in the
run's first second, by the command line's own reader.
"""

import re
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from fpo_core.errors import FPOError
from fpo_core.recipe import load_recipe
from fpo_core.recipe.load import shipped_recipes
from tasks.plan import STAGES

_RECIPES = "|".join(map(re.escape, shipped_recipes()))
RecipeName = Annotated[str, Field(pattern=rf"^({_RECIPES}|.*\.ya?ml)$", examples=shipped_recipes())]
Overrides = list[Annotated[str, Field(examples=["train.alpha=1.0"])]]
# A further SAE's features are features@LAYER, a benchmark's stages generate@NAME, benchmark@NAME.
StageName = Annotated[str, Field(pattern=f"^({'|'.join(STAGES)})(@.+)?$", examples=list(STAGES))]
Force = bool
StoreUrl = str | None

# Of the flow of a stage; Prefect shows what docstrings say of parameters.
PARAMETERS = """Args:
    recipe: a shipped recipe's name, or the path of a YAML file as the worker sees it.
    overrides: settings on top of the recipe, each ``key.path=value``: ``train.alpha=1.0``.
    force: compute the stage anew, dropping what there is of it, a training's checkpoints too;
        else what is done is reused, and what was begun goes on.
    store: a folder or ``s3://bucket/prefix``; where left out, the worker's ``FPO_STORE``, or the
        recipe's.
"""


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
