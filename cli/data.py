"""``fpo data``: what a file or a recipe's data is read as, before anything is computed."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.store import AsJson
from fpo_core.errors import UsageError

if TYPE_CHECKING:
    from fpo_core.recipe import Recipe

SPLITS = ("train", "heldout")

app = typer.Typer(
    help="Check preference data and dialogues.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def _commands() -> None:
    """Keep `check` a subcommand: typer would drop the name of a single command."""


@app.command("check", epilog="Exit codes: 0 a run would take the data, 1 it would stop.")
def check(
    target: Annotated[
        str,
        typer.Argument(
            help="A data source (file, folder, glob, hub split, address), a shipped recipe or a "
            ".yaml file."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; repeatable."),
    ] = None,
    read_as: Annotated[
        Literal["pairs", "dialogues"],
        typer.Option("--as", help="What a data source holds: preference pairs, or dialogues."),
    ] = "pairs",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Model whose tokenizer and chat template render it [quickstart's]"
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Rendered examples to show.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Read data as a run would, and say what became of every row and column.

    Reports per source the columns that are used and not used, then what was dropped and why, the
    lengths before and after truncation, and the first rendered examples. Scored tokens are marked.
    Nothing is stored.

    \b
    Examples:
      fpo data check my-pairs.jsonl
      fpo data check my-pairs.jsonl --set data.max_length=512 --set data.truncation=keep_end
      fpo data check chats.parquet --as dialogues --model ./my-model
      fpo data check 'OWNER/NAME:train[:1%]' --set 'data.columns={prompt: question}'
      fpo data check my-recipe.yaml --json | jq '.[].stats.dropped'
    """
    from cli.show import print_json
    from cli.show_data import print_check
    from tasks.data_check import check_data

    recipe, splits = _recipe(target, read_as, model, overrides or [])
    if splits:
        sections = ["data" if read_as == "pairs" else "sft"]
    else:
        sections = ["data"] if recipe.sft is None else ["sft", "data"]
    checks = [check_data(recipe, section, show, splits or SPLITS) for section in sections]
    if as_json:
        print_json(checks)
    else:
        for found in checks:
            print_check(found)
    if any(found.error for found in checks):
        raise typer.Exit(1)


def _recipe(
    target: str, read_as: str, model: str | None, overrides: list[str]
) -> tuple["Recipe", tuple[str, ...]]:
    """Return the recipe to check and the only splits to check, none for all of a recipe's."""
    from fpo_core.recipe import load_recipe
    from fpo_core.recipe.load import parse_overrides, shipped_recipes

    given: dict[str, Any] = {} if model is None else {"model.source": model}
    if target.endswith((".yaml", ".yml")) or target in shipped_recipes():
        if read_as != "pairs":
            raise UsageError("--as is for a data source. A recipe says itself what it holds")
        return load_recipe(target, {**given, **parse_overrides(overrides)}), ()
    source = [{"path": target}]
    given |= {
        "data.max_length": 2048,
        "data.max_prompt_length": None,
        "data.metadata": [],
        "data.train": source,
        "data.heldout": source,
    }
    if read_as == "dialogues":
        given["sft"] = {"data": source}
    return load_recipe("quickstart", {**given, **parse_overrides(overrides)}), ("train",)
