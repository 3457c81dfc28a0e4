"""``fpo store``: look at the artifacts, verify and repair them, clean up, copy."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fpo_core.errors import UsageError
from storage.errors import StoreError
from storage.location import DEFAULT_STORE, open_store, store_url

StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        envvar="FPO_STORE",
        help=f"A folder, file:///... or s3://bucket/prefix [{DEFAULT_STORE}].",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead, for programs.")]


def in_a_folder(path: Path | None) -> Path | None:
    """Of a file to be written: that it can be is known before the work is done.

    Raises:
        UsageError: its folder is not there.
    """
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {str(path.parent)!r} to write it in")
    return path


AsGroup = Annotated[
    Path | None,
    typer.Option(
        "--group", metavar="FILE", callback=in_a_folder,
        help="Write these features there, as the lines of a recipe.",
    ),
]  # fmt: skip
Names = Annotated[
    list[str] | None,
    typer.Argument(help="STAGE/VERSION, or the start of either; all artifacts where left out."),
]

app = typer.Typer(
    help="Look at the artifact store, verify and repair it, clean it up, copy from it.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip


def _open(url: str | None) -> Any:
    return open_store(store_url(url))


@app.command("ls")
def ls(store: StoreUrl = None, as_json: AsJson = False) -> None:
    """List the artifacts: state, rows, size, age, and the recipes that use them.

    `corrupt` is what shows at a glance (a damaged manifest, a file missing or cut short); `fpo
    store verify` reads every byte.

    \b
    Examples:
      fpo store ls --store s3://team/fpo
      fpo store ls --json | jq '.[] | select(.state != "complete")'
    """
    from cli.show import print_artifacts, print_json
    from storage.catalog import list_artifacts

    opened = _open(store)
    infos = list_artifacts(opened)
    if as_json:
        print_json([{**info._asdict(), "name": info.name} for info in infos])
    else:
        print_artifacts(opened.url, infos)


@app.command("show")
def show(
    artifact: Annotated[str, typer.Argument(help="STAGE/VERSION, or the start of either.")],
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show one artifact's manifest: inputs, settings, statistics, files.

    \b
    Example:
      fpo store show features
    """
    from cli.show import print_artifact, print_json
    from storage.catalog import find_artifact

    opened = _open(store)
    info = find_artifact(opened, artifact)
    if as_json:
        manifest = None
        if info.state != "partial":
            manifest = dict(opened.artifact(info.stage, info.version).manifest)
        print_json({"name": info.name, "state": info.state, "manifest": manifest})
    else:
        print_artifact(opened, info)


@app.command("lineage")
def lineage(
    artifact: Annotated[str, typer.Argument(help="STAGE/VERSION, or the start of either.")],
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Draw what an artifact was made from, and what was made from it.

    \b
    Examples:
      fpo store lineage evaluation
      fpo store lineage pairs/6000
    """
    from cli.show import print_json, print_lineage
    from storage.catalog import find_artifact, list_artifacts
    from storage.lineage import ancestors, descendants

    opened = _open(store)
    name = find_artifact(opened, artifact).name
    infos = list_artifacts(opened)
    above, below = ancestors(name, infos), descendants(name, infos)
    if as_json:
        print_json({"made_from": above, "made_into": below})
    else:
        print_lineage(above, below)


@app.command("verify")
def verify(artifacts: Names = None, store: StoreUrl = None, as_json: AsJson = False) -> None:
    """Read every byte and compare it with what was written. Exit code 1 when something is wrong.

    \b
    Examples:
      fpo store verify
      fpo store verify features/6c51 --json
    """
    from cli.show import print_json, print_verdicts
    from storage.verify import lost_refs

    opened = _open(store)
    infos, verdicts = _verified(opened, artifacts)
    lost = [] if artifacts else lost_refs(opened, infos)
    if as_json:
        print_json({"artifacts": [{**v._asdict(), "ok": v.ok} for v in verdicts], "refs": lost})
    else:
        print_verdicts(verdicts, lost)
    if lost or not all(verdict.ok for verdict in verdicts):
        sys.exit(1)


@app.command("repair")
def repair(artifacts: Names = None, store: StoreUrl = None, as_json: AsJson = False) -> None:
    """Verify, and compute again exactly the shards that are damaged.

    The settings come from the record of the run that made the artifact; its inputs have to be in
    the store, its model and data files where they were.

    \b
    Example:
      fpo store repair features/6c51
    """
    from cli.show import print_json, print_repaired
    from flows.repair import repair_artifacts

    opened = _open(store)
    _, verdicts = _verified(opened, artifacts)
    repaired = repair_artifacts(opened, verdicts)
    if as_json:
        print_json([done._asdict() for done in repaired])
    else:
        print_repaired(repaired)


@app.command("gc")
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove it; without this nothing is removed.")
    ] = False,
    keep_runs: Annotated[
        float, typer.Option(metavar="DAYS", min=0, help="Keep what runs of so many days used.")
    ] = 14,
    grace: Annotated[
        float, typer.Option(metavar="HOURS", min=0, help="Keep what was written in so many hours.")
    ] = 24,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show, or with --delete remove, what nobody needs any more.

    Kept are artifacts that a recipe's ref points at or a recent run used, all that they were made
    from, and whatever is younger than the grace period, which protects runs under way.

    \b
    Examples:
      fpo store gc
      fpo store gc --keep-runs 3 --delete
    """
    from cli.show import print_garbage, print_json
    from storage.gc import find_garbage, remove_garbage

    act = remove_garbage if delete else find_garbage
    found = act(_open(store), keep_runs_days=keep_runs, grace_hours=grace)
    if as_json:
        artifacts = [info.name for info in found.artifacts]
        print_json(
            {
                "deleted": delete, "artifacts": artifacts, "bytes": found.bytes,
                "runs": found.runs, "scratch": [folder.name for folder in found.scratch],
                "kept": found.kept, "in_grace": found.in_grace, "busy": found.busy,
            }
        )  # fmt: skip
    else:
        print_garbage(found, deleted=delete)


@app.command("copy")
def copy(
    target: Annotated[str, typer.Argument(help="The other store: a folder or s3://bucket/prefix.")],
    artifacts: Names = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Copy artifacts, and all that they were made from, to another store.

    Verified on the way; a copy that was interrupted goes on where it stopped. Without names it
    takes every finished artifact. Refs and the records of runs that name them come along, and
    without names the judgments, so that the other store pays for none again, and the labels.

    \b
    Examples:
      fpo store copy s3://team/fpo
      fpo store copy /data/fpo evaluation/b904 --store s3://team/fpo
    """
    from cli.show import print_copied, print_json
    from explorer.labels import copy_labels
    from storage.catalog import find_artifact, list_artifacts
    from storage.copy import copy_artifact, copy_records, with_ancestors
    from storage.judgments import Judgments
    from tasks.transfer import bytes_progress

    source, destination = _open(store), open_store(target)
    destination.check_writable()
    infos = list_artifacts(source)
    names = [find_artifact(source, name).name for name in artifacts or ()]
    chosen = with_ancestors(names or [info.name for info in infos], infos)
    with bytes_progress("copy", sum(info.bytes for info in chosen)) as done:
        copied = [copy_artifact(source, destination, info, done, _tell_waiting) for info in chosen]
    copy_records(source, destination, [one.name for one in copied], move_refs=not artifacts)
    if not artifacts:
        Judgments(source.backend).copy_to(Judgments(destination.backend))
        copy_labels(source, destination)
    if as_json:
        print_json([one._asdict() for one in copied])
    else:
        print_copied(copied, destination.url)


def _tell_waiting() -> None:
    print("another run is writing this artifact there; waiting for it", file=sys.stderr)


def _verified(opened: Any, names: list[str] | None) -> tuple[list[Any], list[Any]]:
    """The listing, and the verdict on the named artifacts or on all."""
    from storage.catalog import find_artifact, list_artifacts
    from storage.verify import verify_artifacts
    from tasks.transfer import bytes_progress

    infos = list_artifacts(opened)
    chosen = [find_artifact(opened, name) for name in names] if names else infos
    for info in chosen if names else ():
        if info.state == "partial":
            raise StoreError(f"{info.name} is not finished: run its recipe again to finish it")
    with bytes_progress("verify", sum(info.bytes for info in chosen)) as done:
        return infos, verify_artifacts(opened, chosen, done)
