"""``fpo bench``: the packs of questions, baseline answers and judge's prompts."""

import sys
from typing import Annotated

import typer

from cli.store import AsJson

app = typer.Typer(
    help="Get and check packs: a benchmark's questions, baseline answers and judge's prompts.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip


@app.command("list")
def list_packs(as_json: AsJson = False) -> None:
    """List the packs that are known by name, and whether they are here.

    Their texts belong to their authors and are not shipped. `not pinned` are files whose content
    could not be checked beforehand; what is pulled is pinned from then on.

    \b
    Examples:
      fpo bench list
      fpo bench list --json | jq '.[] | select(.pulled | not) | .name'
    """
    from rich.console import Console

    from cli.show import new_table, print_json
    from fpo_core.bench.pack import packs_folder
    from fpo_core.bench.pull import KNOWN_PACKS, is_pulled

    if as_json:
        known = [pack.model_dump() for pack in KNOWN_PACKS.values()]
        print_json([{**pack, "pulled": is_pulled(pack["name"])} for pack in known])
        return
    table = new_table("pack", "kind", "here", "not pinned", "licence")
    for pack in KNOWN_PACKS.values():
        open_ones = [role for role, file in pack.files.items() if file.sha256 is None]
        here = "yes" if is_pulled(pack.name) else "no"
        table.add_row(pack.name, pack.kind, here, ", ".join(open_ones), pack.licence)
    console = Console()
    console.print(table)
    for pack in KNOWN_PACKS.values():
        console.print(f"{pack.name}: {pack.notes}", highlight=False)
    console.print(f"\nfolder: {packs_folder()}", highlight=False, soft_wrap=True)


@app.command("pull")
def pull(
    name: Annotated[str, typer.Argument(help="A pack's name; `fpo bench list` has them.")],
    as_json: AsJson = False,
) -> None:
    """Fetch a pack from where its authors publish it, and check every row of it.

    Files go into `packs/NAME` of FPO_CACHE. What is there as pinned is kept: put files there by
    hand where there is no network, and the same command checks them and finishes the pack.

    \b
    Examples:
      fpo bench pull mt-bench
      fpo bench pull ifeval && fpo bench check ifeval
    """
    from cli.show import print_json
    from fpo_core.bench.pull import known_pack, pull_pack

    known = known_pack(name)
    pulled = pull_pack(known, lambda line: print(line, file=sys.stderr))
    if as_json:
        print_json(pulled)
        return
    print(f"{pulled.pack.name}: {pulled.pack.folder}")
    print(f"fetched {len(pulled.fetched)} files, kept {len(pulled.kept)}")
    for role, file in known.files.items():
        if file.sha256 is None:
            print(f"{role}: had no pinned sha256; it is pinned in pack.yaml now, as it came")


@app.command("check", epilog="Exit codes: 0 the pack can be used, 1 it cannot; the error says why.")
def check(
    pack: Annotated[str, typer.Argument(help="A folder, written with a slash, or a pulled pack.")],
    as_json: AsJson = False,
) -> None:
    """Read every row of a pack: columns, ids, baseline against questions, prompts, sha256.

    A folder needs a pack.yaml, or an original's files by their own names; so a checkout of
    arena-hard-auto, FastChat or google-research can be given as it is.

    \b
    Examples:
      fpo bench check ./my-questions
      fpo bench check ~/FastChat
      fpo bench check arena-hard-v0.1 --json
    """
    from cli.show import print_json
    from fpo_core.bench.pack import load_pack

    found = load_pack(pack)
    if as_json:
        print_json(found)
        return
    print(f"{found.name} ({found.kind}): {found.folder}")
    for role, file in found.files.items():
        print(f"  {role}: {file.relative_to(found.folder)}")
    print(f"digest {found.digest}")
