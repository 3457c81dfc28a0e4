"""``fpo sae``: does a recipe's SAE fit its model?"""

import sys
from typing import Annotated

import typer

from cli.store import AsJson, StoreUrl

app = typer.Typer(
    help="Check sparse autoencoders against the model that they read.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip


@app.callback()
def _commands() -> None:
    """With a single command, typer would leave its name out."""


@app.command("check", epilog="Exit codes: 0 every SAE fits, 1 one is refused or cannot be read.")
def check(
    recipe: Annotated[
        str, typer.Argument(help="A shipped recipe (quickstart, gemma2b, ...) or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; repeatable."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=64, help="Tokens to measure on [2048, as `features` does].")
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Measure every SAE of a recipe where it is to read, as the `features` stage does first.

    FVU (the share of the activations' variance that it leaves unexplained), active features a
    token beside what it declares, features that never fired, and how much of the model's
    cross-entropy survives the reconstruction. One that is not in its place is refused with the
    likely cause: another layer or site that it explains better, a normalisation, another model.

    The tokens are those of the recipe's pairs, which are put into the store when they are not
    there yet.

    \b
    Examples:
      fpo sae check quickstart
      fpo sae check quickstart --set sae.layer=19      what a wrong layer looks like
      fpo sae check quickstart --set sae.site=final_norm
      fpo sae check gemma2b --json | jq '.[].record.fvu'
    """
    from cli.show import print_json, print_sae_checks
    from tasks.check import check_saes
    from tasks.run import prepare_run

    run, _ = prepare_run(recipe, overrides or [], store, only="tokenize")
    checks = check_saes(run, tokens)
    if as_json:
        print_json(checks)
    else:
        print_sae_checks(checks)
    if any(found.verdict == "refused" for found in checks):
        sys.exit(1)
