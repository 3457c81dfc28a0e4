"""Tables of the ``fpo`` command."""

import datetime as dt
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from fpo_core.recipe import Recipe
from storage.catalog import ArtifactInfo
from storage.copy import Copied
from storage.gc import Garbage
from storage.lineage import Node
from storage.store import Store
from storage.verify import Verdict
from tasks.plan import Plan
from tasks.reasons import Reason
from tasks.run import human_bytes

if TYPE_CHECKING:  # these import Prefect or draw, which takes seconds
    from flows.repair import Repaired
    from fpo_core.report.comparison import ComparisonReport
    from tasks.check import SaeCheck

_LONG_DIGEST = re.compile(r"[0-9a-f]{20,}")
# Of an audit: too many for 80 columns unless its interval is what breaks.
UNBROKEN = ("feature", "side", "reference", "policy", "change", "effect", "q")
SAE_FIGURES = ("FVU", "L0", "declared", "dead", "CE recovered")
_ACTION = {"complete": "reuse", "partial": "resume", "missing": "compute"}


def print_json(value: Any) -> None:
    """A result for programs: named tuples become objects, and what is no number null."""
    print(json.dumps(_plain(value), indent=2, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _console() -> Console:
    return Console()


def new_table(*columns: str) -> Table:
    """An empty table; columns of numbers are right-aligned."""
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in columns:
        right = column in ("rows", "tokens", "size", "FLOPs", "age", *SAE_FIGURES)
        table.add_column(
            column, justify="right" if right else "left", overflow="fold",
            no_wrap=column in UNBROKEN,
        )  # fmt: skip
    return table


def with_interval(audit: pl.DataFrame) -> pl.DataFrame:
    """A table of an audit as people read it: its interval in one column, p left to q.

    q is rounded to one digit, and there are no labels where nothing has one.
    """
    bounds = zip(audit["low"], audit["high"], strict=True)
    interval = pl.Series("95 % interval", [f"{low:+.3g} to {high:+.3g}" for low, high in bounds],
                         dtype=pl.String)  # fmt: skip
    shown = audit.drop("p", "low", "high").with_columns(interval)
    if "q" in shown.columns:
        q = pl.Series("q", [f"{one:.1g}" for one in shown["q"]], dtype=pl.String)
        shown = shown.with_columns(q)
    if "label" in shown.columns and not any(shown["label"]):
        shown = shown.drop("label")
    return shown


def print_plan(
    recipe: Recipe, plan: Plan, store: Store, stages: Sequence[str], reasons: Mapping[str, Reason]
) -> None:
    """What a run of the recipe would do with some of its stages, and why."""
    console = _console()
    console.print(
        f"recipe {recipe.name}: {recipe.train.method}, store {store.url}", highlight=False
    )
    table = new_table("stage", "action", "artifact", "rows", "size")
    for stage in (plan.stages[name] for name in stages):
        rows = size = ""
        if stage.state == "complete":
            manifest = store.artifact(stage.artifact, stage.version).manifest
            rows, size = f"{manifest['rows'] or '':}", human_bytes(manifest["bytes"])
        name = f"{stage.artifact}/{stage.version}"
        table.add_row(stage.stage, _ACTION[stage.state], name, rows, size)
    console.print(table)
    for name in stages:
        if name in reasons:
            since = f" (against {reasons[name].since})" if reasons[name].changes else ""
            console.print(Text(f"{name}: {reasons[name]}{since}"))
    if plan.unresolved:
        console.print(
            f"not reachable from here: {', '.join(plan.unresolved)}. Their content is not known, "
            f"so versions are provisional; running needs the network, or local copies.",
            highlight=False,
        )


def print_artifacts(url: str, infos: Sequence[ArtifactInfo]) -> None:
    """The store's artifacts, newest first."""
    console = _console()
    if not infos:
        console.print(f"the store {url} is empty; `fpo run quickstart` fills it")
        return
    table = new_table("artifact", "state", "rows", "size", "age", "recipes")
    for info in sorted(infos, key=lambda info: info.created or "", reverse=True):
        table.add_row(
            info.name, info.state, f"{info.rows:,}" if info.rows else "", human_bytes(info.bytes),
            _age_of(info), ", ".join(info.refs),
        )  # fmt: skip
    console.print(table)
    for info in infos:
        if info.reason:
            console.print(Text(f"{info.name}: {info.reason}"))
    if any(info.state == "corrupt" for info in infos):
        console.print("`fpo store repair` computes again what is damaged")


def print_artifact(store: Store, info: ArtifactInfo) -> None:
    """One artifact's manifest."""
    console = _console()
    if info.state == "partial":
        console.print(f"{info.name} is not finished: run its recipe again to finish it")
        return
    manifest = dict(store.artifact(info.stage, info.version).manifest)
    files = manifest.pop("files")
    console.print_json(json.dumps(manifest, default=str))
    table = new_table("file", "size", "sha256")
    for path, file in sorted(files.items()):
        table.add_row(Text(path), human_bytes(file["bytes"]), file["sha256"][:16])
    console.print(table)
    if info.reason:
        console.print(Text(f"damaged: {info.reason}"))


def print_lineage(made_from: Node, made_into: Node) -> None:
    """Two trees: up to data and models, and down to what uses the artifact."""
    console = _console()
    for title, node, nothing in (
        ("made from", made_from, "nothing in this store"),
        ("made into", made_into, "nothing yet"),
    ):
        tree = Tree(Text(f"{node.name}, {title}"))
        drawn: set[str] = set()
        for branch in node.branches:
            _grow(tree, branch, drawn)
        if not node.branches:
            tree.add(nothing)
        console.print(tree)


def _grow(tree: Tree, node: Node, drawn: set[str]) -> None:
    """Add a node; one that was drawn with its branches before is only named again."""
    notes = [] if node.state in ("complete", "external") else [node.state]
    again = node.branches and node.name in drawn
    if again:
        notes.append("as above")
    drawn.add(node.name)
    name = _LONG_DIGEST.sub(lambda match: f"{match[0][:12]}...", node.name)
    inner = tree.add(Text(f"{name}  ({', '.join(notes)})" if notes else name))
    for branch in () if again else node.branches:
        _grow(inner, branch, drawn)


def print_verdicts(verdicts: Sequence[Verdict], lost_refs: Sequence[str]) -> None:
    """What verification found."""
    console = _console()
    for verdict in verdicts:
        if verdict.manifest_fault:
            console.print(Text(f"{verdict.name}: {verdict.manifest_fault}"))
        for file, why in verdict.bad_files.items():
            console.print(Text(f"{verdict.name}: {file}: {why}"))
    for line in lost_refs:
        console.print(Text(line))
    bad = sum(not verdict.ok for verdict in verdicts)
    read = human_bytes(sum(verdict.bytes for verdict in verdicts))
    console.print(f"{len(verdicts)} artifacts, {read} read: {bad or 'none'} damaged")
    if bad:
        console.print("`fpo store repair` computes again what is damaged")


def print_repaired(repaired: "Sequence[Repaired]") -> None:
    """What was computed again."""
    console = _console()
    for done in repaired:
        again = ", ".join(done.computed_again) or "the manifest"
        same = "as before" if done.identical else "its files differ from the former ones"
        console.print(Text(f"{done.name}: {again} computed again, {same}"))
    if not repaired:
        console.print("nothing is damaged")


def print_garbage(found: Garbage, *, deleted: bool) -> None:
    """What can go, or went."""
    console = _console()
    if found.artifacts:
        table = new_table("artifact", "state", "size", "age")
        for info in found.artifacts:
            table.add_row(info.name, info.state, human_bytes(info.bytes), _age_of(info))
        console.print(table)
    verb = "removed" if deleted else "could be removed"
    console.print(
        f"{len(found.artifacts)} artifacts ({human_bytes(found.bytes)}), {len(found.runs)} old run "
        f"records and {len(found.scratch)} folders of killed runs {verb}; {found.kept} artifacts "
        f"are needed, {found.in_grace} more are in the grace period"
    )
    if found.busy:
        console.print(f"{found.busy} artifacts stayed: somebody is writing or just chose them")
    if (found.artifacts or found.scratch) and not deleted:
        console.print("`fpo store gc --delete` removes them")


def print_copied(copied: Sequence[Copied], url: str) -> None:
    """What was copied where."""
    console = _console()
    table = new_table("artifact", "state", "size")
    for one in copied:
        table.add_row(one.name, one.state, human_bytes(one.bytes) if one.bytes else "")
    console.print(table)
    console.print(Text(f"{len(copied)} artifacts are in {url}"))


def _age_of(info: ArtifactInfo) -> str:
    """Since it was finished, or since something of it was last written."""
    modified = dt.datetime.fromtimestamp(info.modified, dt.UTC).isoformat()
    return _age(info.created or modified)


def _age(created: str | None) -> str:
    if not created:
        return ""
    seconds = (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def print_sae_checks(checks: "Sequence[SaeCheck]") -> None:
    """The gate's figures of each SAE, and why one is not in its place."""
    console = _console()
    table = new_table("place", *SAE_FIGURES, "verdict")
    for check in checks:
        told = check.record
        shares = (told["dead_fraction"], told["ce_recovered"])
        table.add_row(
            told["place"], _figure(told["fvu"], ".3f"), _figure(told["l0"], ".1f"),
            _figure(told["declared"]["l0"], ".1f"), *(_figure(share, ".1%") for share in shares),
            check.verdict,
        )  # fmt: skip
    console.print(table)
    for check in checks:
        for line in (check.record["cause"], *check.record["warnings"]):
            if line:
                console.print(f"{check.record['place']}: {line}", highlight=False, markup=False)


def _figure(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def print_comparison(report: "ComparisonReport") -> None:
    """The runs' metrics with intervals, and what each two of them differ by."""
    from fpo_core.report.comparison_tables import accuracy_differences, tables
    from fpo_core.report.comparison_tables import differences as pairwise

    console = _console()
    found = [table for table in tables(report) if table.name not in ("accuracy_entropy", "cost")]
    # Of many runs each two are many tables: those are for the page.
    found += pairwise(report) if len(report.runs) == 2 else accuracy_differences(report)
    # So many columns that cells would be broken anywhere: intervals get a line of their own.
    gap = " " if len(report.runs) <= 3 else "\n"
    for one in found:
        table = Table(box=box.SIMPLE, pad_edge=False, title=Text(one.title), title_justify="left")
        for column in one.columns:
            left = column in (one.columns[0], "Reading")
            table.add_column(Text(column), justify="left" if left else "right", overflow="fold")
        for row in one.rows:
            cells = (f"{c.value}{gap}[{c.interval}]" if c.interval else c.value for c in row)
            table.add_row(*map(Text, cells))
        console.print(table)
    for label, reason in report.refused:
        console.print(Text(f"not compared: {label}: {reason}"))
