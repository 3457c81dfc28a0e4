"""A sweep on a store: which of its cells are the same, what they share, what is left to do."""

from collections.abc import Sequence
from typing import NamedTuple

from fpo_core.errors import UsageError
from fpo_core.recipe.sweep import Cell, cells_of_grid, cells_of_preset, load_preset, parse_grid
from storage.store import Store
from tasks.estimate import Estimates, WhatIf, estimate_plan
from tasks.plan import Plan, make_plan
from tasks.run import recipe_store


class PlannedCell(NamedTuple):
    """A cell with its plan; of cells that come to the same, the first."""

    cell: Cell
    plan: Plan
    same_as: tuple[str, ...]  # names of the cells that it stands for too

    @property
    def missing(self) -> list[str]:
        """Its stages that are not done."""
        return [name for name, stage in self.plan.stages.items() if stage.state != "complete"]

    @property
    def evaluation(self) -> str:
        """The evaluation it ends in, as ``artifact/version``."""
        return self.plan.stages["evaluate"].name


class Sweep(NamedTuple):
    """What a sweep consists of."""

    title: str
    store: Store
    cells: tuple[PlannedCell, ...]
    paper: tuple[str, ...]

    @property
    def shared(self) -> dict[str, list[str]]:
        """The missing artifacts that several cells need, and those cells."""
        users: dict[str, list[str]] = {}
        for one in self.cells:
            for stage in one.missing:
                users.setdefault(one.plan.stages[stage].name, []).append(one.cell.name)
        return {name: cells for name, cells in users.items() if len(cells) > 1}


class CellEstimates(NamedTuple):
    """What a cell adds to what the cells before it compute."""

    cell: str
    stages: tuple[str, ...]
    estimates: Estimates


def plan_sweep(
    recipe: str,
    overrides: Sequence[str],
    grid: Sequence[str],
    preset: str | None,
    store: str | None,
) -> Sweep:
    """Read a sweep and plan its cells: all that can fail before work begins.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file.
        overrides: ``key.path=value`` settings of all cells.
        grid: ``key.path=value,value`` axes.
        preset: a shipped sweep's name or a YAML file, instead of axes.
        store: the store's URL; ``FPO_STORE``'s or the recipe's where it is None.

    Raises:
        UsageError: no axis and no preset, or both; a cell that is no recipe.
        FPOError: a model, SAE or data file is missing.
    """
    if bool(grid) == (preset is not None):
        raise UsageError("give --grid KEY.PATH=VALUE,VALUE (it can be repeated), or --preset NAME")
    if preset is None:
        title, paper = f"Sweep of {recipe}", ()
        cells = cells_of_grid(recipe, overrides, parse_grid(grid))
    else:
        found = load_preset(preset)
        title, paper = found.title, found.paper
        cells = cells_of_preset(recipe, overrides, found)
    artifacts = recipe_store(cells[0].recipe, store)
    artifacts.check_writable()
    return Sweep(title, artifacts, _distinct(cells, artifacts), paper)


def _distinct(cells: Sequence[Cell], store: Store) -> tuple[PlannedCell, ...]:
    planned: dict[str, PlannedCell] = {}
    for cell in cells:
        plan = make_plan(cell.recipe, store)
        one = PlannedCell(cell, plan, ())
        # The evaluation's version follows from everything before it; benchmarks' stages do not.
        same = "|".join(stage.name for stage in plan.stages.values())
        first = planned.setdefault(same, one)
        if first is not one and cell.name != first.cell.name:
            planned[same] = first._replace(same_as=(*first.same_as, cell.name))
    return tuple(planned.values())


def estimate_sweep(sweep: Sweep) -> list[CellEstimates]:
    """What each cell costs beyond what cells before it have made."""
    made: set[str] = set()
    found = []
    for one in sweep.cells:
        stages = [stage for stage in one.missing if one.plan.stages[stage].name not in made]
        made |= {one.plan.stages[stage].name for stage in stages}
        nothing = WhatIf(None, None, None)
        estimates = estimate_plan(one.cell.recipe, one.plan, sweep.store, nothing, stages)
        found.append(CellEstimates(one.cell.name, tuple(stages), estimates))
    return found
