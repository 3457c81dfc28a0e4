"""Tables of the ``fpo`` command."""

import datetime as dt
import json

from rich import box
from rich.console import Console
from rich.table import Table

from fpo_core.recipe import Recipe
from storage.store import Store
from tasks.plan import Plan
from tasks.run import human_bytes

_ACTION = {"complete": "reuse", "partial": "resume", "missing": "compute"}


def _console() -> Console:
    return Console()


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in columns:
        right = column in ("rows", "size", "age")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def print_plan(recipe: Recipe, plan: Plan, store: Store) -> None:
    """What a run of the recipe would do."""
    console = _console()
    console.print(
        f"recipe {recipe.name}: {recipe.train.method}, store {store.url}", highlight=False
    )
    table = _table("stage", "action", "artifact", "rows", "size")
    for stage in plan.stages.values():
        rows = size = ""
        if stage.state == "complete":
            manifest = store.artifact(stage.artifact, stage.version).manifest
            rows, size = f"{manifest['rows'] or '':}", human_bytes(manifest["bytes"])
        name = f"{stage.artifact}/{stage.version}"
        table.add_row(stage.stage, _ACTION[stage.state], name, rows, size)
    console.print(table)
    if plan.unresolved:
        console.print(
            f"not reachable from here: {', '.join(plan.unresolved)}. Their content is not known, "
            f"so versions are provisional; running needs the network, or local copies.",
            highlight=False,
        )


def print_artifacts(store: Store) -> None:
    """The store's artifacts, newest first."""
    infos = sorted(store.artifacts(), key=lambda info: info.created or "", reverse=True)
    console = _console()
    if not infos:
        console.print(f"the store {store.url} is empty; `fpo run quickstart` fills it")
        return
    table = _table("artifact", "state", "rows", "size", "age", "recipes")
    for info in infos:
        table.add_row(
            f"{info.stage}/{info.version}", info.state, f"{info.rows:,}" if info.rows else "",
            human_bytes(info.bytes), _age(info.created), ", ".join(info.refs),
        )  # fmt: skip
    console.print(table)


def print_artifact(store: Store, name: str) -> None:
    """One artifact's manifest."""
    info = store.find(name)
    console = _console()
    if info.state != "complete":
        console.print(f"{info.stage}/{info.version} is {info.state}: rerun its stage to finish it")
        return
    manifest = dict(store.artifact(info.stage, info.version).manifest)
    files = manifest.pop("files")
    console.print_json(json.dumps(manifest, default=str))
    table = _table("file", "size", "sha256")
    for path, file in sorted(files.items()):
        table.add_row(path, human_bytes(file["bytes"]), file["sha256"][:16])
    console.print(table)


def _age(created: str | None) -> str:
    if not created:
        return ""
    seconds = (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
