"""``fpo audit``: what training moved, feature by feature."""

from pathlib import Path
from typing import Annotated, Any, Literal

import polars as pl
import typer
import yaml
from rich.console import Console
from rich.text import Text

from cli.store import AsGroup, AsJson, StoreUrl, in_a_folder
from fpo_core.errors import FPOError, UsageError


def audit(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a .yaml file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="As of the run."),
    ] = None,
    groups: Annotated[
        list[Path] | None,
        typer.Option(
            "--groups", metavar="FILE", help="Feature groups, as `fpo cache find --group` writes."
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against", metavar="GROUP:GROUP", help="And how two groups moved apart; repeatable."
        ),
    ] = None,
    sort: Annotated[
        Literal["effect", "change"], typer.Option(help="What is large comes first.")
    ] = "effect",
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows shown.")] = 20,
    group: AsGroup = None,
    name: Annotated[str, typer.Option(help="Of that group.")] = "moved",
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: Annotated[
        Path | None,
        typer.Option(
            "--parquet",
            metavar="FILE",
            callback=in_a_folder,
            help="Write all features and sides there.",
        ),
    ] = None,
) -> None:
    """What preference training moved: effect sizes of the SAE's features on held-out pairs.

    Of each feature and side the mean change from reference to policy with its 95 % interval, the
    effect size (change over its standard deviation), and q, the false discovery rate at which it
    counts as moved. Groups are the recipe's, those of --groups, and features of one label.

    \b
    Examples:
      fpo audit quickstart
      fpo audit quickstart --set train.method=dpo --groups style.yaml --parquet moved.parquet
      fpo audit quickstart --groups style.yaml --groups content.yaml --against style:content
      fpo audit quickstart --sort change -n 60 --group moved.yaml
    """
    from cli.show import new_table, print_json, with_interval
    from explorer.group import check_name, group_yaml
    from explorer.labels import Labels
    from explorer.store import sae_of_run
    from fpo_core.evaluation.audit import RATE
    from tasks.audit import audit_run
    from tasks.run import prepare_run

    check_name(name)
    apart = [_two_groups(one) for one in against or []]
    run, _ = prepare_run(recipe, overrides or [], store, only="tokenize")
    labels = Labels(run.store, sae_of_run(run))
    taken, given = set(run.recipe.train.group_features), {}
    for path in groups or []:
        for called, members in _read_groups(path).items():
            if called in taken:
                raise UsageError(f"{path.name}: there is a group {called!r} already; rename one")
            taken.add(called)
            given[called] = members
    labelled = {f"{text} (label)" if text in taken else text: members
                for text, members in labels.groups().items()}  # fmt: skip
    found = audit_run(run, {**labelled, **given}, apart)
    named = [labels.text(one) for one in found.features["feature"].to_list()]
    features = found.features.insert_column(1, pl.Series("label", named, dtype=pl.String))
    if sort == "change":
        features = features.sort(pl.col("change").abs(), descending=True, maintain_order=True)
    if group is not None:
        text = group_yaml(features.head(limit)["feature"].to_list(), name)
        group.write_text(text, encoding="utf-8")
    if parquet is not None:
        features.write_parquet(parquet)
    if as_json:
        print_json({"policy": found.policy, "pairs": found.pairs,
                    "features": features.head(limit).to_dicts(),
                    "groups": found.groups.to_dicts()})  # fmt: skip
        return
    console = Console()
    moved = features.filter(pl.col("q") < RATE).height
    console.print(Text(
        f"{found.policy} on {found.pairs} held-out pairs: {moved:,} of {features.height:,} "
        f"features and sides that fire moved (q < {RATE:g})"
    ))  # fmt: skip
    for frame in (found.groups, features.head(limit)):
        if not frame.height:
            continue
        shown = with_interval(frame)
        table = new_table(*shown.columns)
        for row in shown.iter_rows():
            table.add_row(*(Text(_cell(one)) for one in row))
        console.print(table)


def _read_groups(path: Path) -> dict[str, list[int]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {
            str(one["name"]): [int(n) for n in one["features"]] for one in found["train"]["groups"]
        }
    except FileNotFoundError as error:
        raise FPOError(f"--groups {path}: there is no such file") from error
    except OSError as error:
        raise FPOError(f"--groups {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise FPOError(
            f"{path.name}: no feature groups; it is to have train.groups with name and features, "
            f"as `fpo cache group` prints them"
        ) from error


def _two_groups(text: str) -> tuple[str, str]:
    one, colon, other = text.partition(":")
    if not colon:
        raise UsageError(f"--against {text}: give two groups as ONE:OTHER")
    return one, other


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
