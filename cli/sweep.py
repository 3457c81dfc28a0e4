"""``fpo sweep``: a grid of settings over shared caches."""

from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cli.store import AsJson, StoreUrl
from fpo_core.errors import UsageError


def sweep(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A shipped recipe or a .yaml file.", show_default=False),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="KEY.PATH=VALUE,VALUE", help="An axis of the grid; can be repeated."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A sweep by name, or a .yaml file of one, instead of --grid."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting in all cells."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, metavar="N", help="Cells at a time.")] = 1,
    report_folder: Annotated[
        str | None,
        typer.Option("--report", metavar="DIR", help="Where reports go [reports/sweep-RECIPE]."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only tell what would run, and what that would cost.")
    ] = False,
    presets: Annotated[
        bool, typer.Option("--presets", help="Only list the sweeps that come with the project.")
    ] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe once for every combination of some settings, and compare the runs.

    Caches that cells share are computed once, cells that are done are reused, and an interrupted
    sweep goes on. A cell that fails does not stop the others. The folder receives the comparison
    (compare.html, figures, tables) and each cell's own report.

    \b
    Examples:
      fpo sweep quickstart --grid train.method=dpo,simpo,fpo --grid train.alpha=0.1,0.5
      fpo sweep quickstart --preset methods --plan
      fpo sweep gemma2b --preset layers --report reports/table3
      fpo sweep --presets
    """
    if presets:
        _list_presets(as_json=as_json)
        return
    if recipe is None:
        raise UsageError("name a recipe: fpo sweep RECIPE --grid KEY.PATH=VALUE,VALUE")
    from tasks.sweep import plan_sweep

    planned = plan_sweep(recipe, overrides or [], grid or [], preset, store)
    if plan:
        _print_plan(planned, as_json=as_json)
        return
    from cli.show import print_json
    from flows.ablation import fpo_ablation
    from flows.local import has_server, terminable

    given = {
        "recipe": recipe,
        "grid": grid or [],
        "preset": preset,
        "overrides": overrides or [],
        "parallel": parallel,
        "store": store,
        "report_folder": report_folder,
    }
    if has_server():
        outcomes = fpo_ablation(**given)
    else:
        with terminable():
            outcomes = fpo_ablation.fn(**given)
    if as_json:
        print_json(outcomes)


def _list_presets(*, as_json: bool) -> None:
    from cli.show import new_table, print_json
    from fpo_core.recipe.sweep import load_preset, preset_names

    found = {name: load_preset(name) for name in preset_names()}
    if as_json:
        print_json({name: preset.model_dump() for name, preset in found.items()})
        return
    table = new_table("preset", "what it varies", "cells", "recipes")
    for name, preset in found.items():
        cells = len(preset.cells)
        if preset.grid:
            cells = 1
            for values in preset.grid.values():
                cells *= len(values)
        about = Text(f"{preset.title}: {preset.description}")
        table.add_row(name, about, str(cells), ", ".join(preset.of) or "any")
    Console().print(table)


def _print_plan(planned: object, *, as_json: bool) -> None:
    from cli.estimates import print_cell_estimates
    from cli.show import new_table, print_json
    from tasks.sweep import Sweep, estimate_sweep

    assert isinstance(planned, Sweep)
    estimates = estimate_sweep(planned)
    if as_json:
        print_json({
            "title": planned.title, "store": planned.store.url, "cells": [
                {"cell": one.cell.name, "overrides": one.cell.overrides, "same_as": one.same_as,
                 "stages": one.plan.stages} for one in planned.cells
            ], "shared": planned.shared, "estimates": estimates,
        })  # fmt: skip
        return
    console = Console()
    console.print(Text(f"{planned.title}, store {planned.store.url}"))
    owned = {one.cell: set(one.stages) for one in estimates}
    table = new_table("cell", "computed", "from a cell before", "reused", "evaluation")
    for one in planned.cells:
        name, missing = one.cell.name, one.missing
        computed = [stage for stage in missing if stage in owned[name]]
        shared = [stage for stage in missing if stage not in owned[name]]
        reused = [stage for stage in one.plan.stages if stage not in missing]
        same = f" (= {'; '.join(one.same_as)})" if one.same_as else ""
        table.add_row(
            Text(f"{name}{same}"), *(", ".join(part) for part in (computed, shared, reused)),
            one.evaluation.partition("/")[2],
        )  # fmt: skip
    console.print(table)
    print_cell_estimates(estimates)
