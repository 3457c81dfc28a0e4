"""``fpo cache``: browse stored feature caches in a terminal."""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console
from rich.text import Text

from cli.store import AsGroup, AsJson, StoreUrl, in_a_folder

app = typer.Typer(
    help="Browse stored feature caches: which features tell chosen from rejected, and where they "
    "fire.",
    no_args_is_help=True, rich_markup_mode=None,
)  # fmt: skip

Cache = Annotated[
    str,
    typer.Argument(metavar="CACHE", help="features/VERSION, its start, or a recipe's name."),
]
AsParquet = Annotated[
    Path | None,
    typer.Option(
        "--parquet",
        metavar="FILE",
        callback=in_a_folder,
        help="Write the table there instead; - for stdout.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="NAME=VALUE",
        help="Only pairs with this metadata; also !=, <, <=, >, >=. Repeatable: all must hold.",
    ),
]
SHADES = ("", "on grey15", "on grey23", "on dark_green", "on green4")  # by strength
LONGEST_CELL = 1000  # characters
UNSCORED = "dim italic"  # tokens of other speakers' turns


@app.command("ls")
def ls(store: StoreUrl = None, as_json: AsJson = False, parquet: AsParquet = None) -> None:
    """List the feature caches of a store."""
    from cli.show import new_table, print_json
    from explorer import open_store

    opened = open_store(store)
    caches = opened.caches()
    if parquet is not None:
        columns = ("name", "created", "rows", "bytes", "refs")
        kinds = {"rows": pl.Int64, "refs": pl.List(pl.String)}
        rows = [{name: getattr(info, name) for name in columns} for info in caches]
        _write_parquet(pl.DataFrame(rows, schema_overrides=kinds), parquet)
        return
    if as_json:
        print_json(caches)
        return
    table = new_table("artifact", "rows", "size", "recipes")
    for info in caches:
        table.add_row(info.name, f"{info.rows or 0:,}", _size(info.bytes), ", ".join(info.refs))
    Console().print(table if caches else "no feature cache here; `fpo run quickstart` makes one")


@app.command("features")
def features(
    cache: Cache,
    sort: Annotated[
        str,
        typer.Option(
            help="difference (chosen less rejected), change (its size), ratio (how one-sided), "
            "density, mean, max or feature."
        ),
    ] = "difference",
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first.")] = False,
    min_density: Annotated[float, typer.Option(min=0, max=1, help="Share of tokens.")] = 0.0,
    max_density: Annotated[float, typer.Option(min=0, max=1, help="Share of tokens.")] = 1.0,
    search: Annotated[str, typer.Option(help="In labels, or an index.")] = "",
    where: Where = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows.")] = 20,
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: AsParquet = None,
) -> None:
    """The features of a cache, in some order.

    \b
    Examples:
      fpo cache features quickstart                       what is stronger in chosen responses
      fpo cache features quickstart --ascending           what is stronger in rejected ones
      fpo cache features quickstart --sort ratio --min-density 0.001 -n 50
      fpo cache features quickstart -n 100000 --parquet features.parquet
      fpo cache features quickstart --where topic=maths   the means over these pairs only
    """
    from explorer import open_store
    from explorer.features import FeatureQuery, feature_table
    from explorer.index import open_pair_index
    from explorer.labels import Labels
    from explorer.metadata import restricted_stats

    opened = open_store(store)
    found = opened.features(cache)
    query = FeatureQuery(sort, not ascending, min_density, max_density, search, 0, limit)
    numbers, stats, told = _matching(found, where), None, ""
    if numbers is not None:
        stats = restricted_stats(found, open_pair_index(found), numbers)
        told = f"; chosen, rejected and difference over {_told(found, numbers, where)}"
    page = feature_table(found, query, Labels(opened.store, found.sae), stats)
    title = f"{found.name}: {page.total:,} features of {found.sae.d_sae:,}{told}"
    _give(page.rows, title, as_json=as_json, parquet=parquet)


@app.command("feature")
def feature(
    cache: Cache,
    number: Annotated[int, typer.Argument(metavar="FEATURE", help="Its index in the SAE.")],
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="Shown.")] = 5,
    logits: Annotated[
        bool, typer.Option("--logits", help="And the tokens whose logits it raises and lowers.")
    ] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: AsParquet = None,
) -> None:
    """One feature: statistics, distribution over responses, and where it fires most.

    \b
    Example:
      fpo cache feature quickstart 849 --logits
    """
    from cli.show import print_json
    from explorer import open_store
    from explorer.features import feature_histogram, feature_view
    from explorer.index import open_feature_index, open_pair_index
    from explorer.labels import Labels

    opened = open_store(store)
    found = opened.features(cache)
    labels = Labels(opened.store, found.sae)
    view = feature_view(found, open_pair_index(found), number, examples, labels)
    histogram = feature_histogram(found, open_feature_index(found), number)
    effect = _logits(opened, found, number) if logits else None
    if parquet is not None:  # its examples: a row a token that is shown
        rows = [
            {"pair_id": one.pair_id, "side": one.side, **piece._asdict()}
            for one in view.examples for piece in one.pieces
        ]  # fmt: skip
        _write_parquet(pl.DataFrame(rows), parquet)
        return
    if as_json:
        numbers = histogram._asdict().items()
        shown = {name: getattr(v, "tolist", lambda v=v: v)() for name, v in numbers}
        print_json({**view._asdict(), "histogram": shown, "logits": effect})
        return
    console = Console()
    called = f": {view.label}" if view.label else ""
    console.print(Text(f"feature {number} of {found.name}{called}"))
    stats = view.stats
    console.print(
        f"density {stats['density']:.2%}, mean {stats['mean']:.3g}, max {stats['max']:.3g}; "
        f"of responses {stats['mean_chosen']:.3g} chosen, {stats['mean_rejected']:.3g} rejected",
        highlight=False,
    )
    if page := found.sae.neuronpedia_url(number):
        console.print(page)
    _print_histogram(console, histogram)
    if found.detokenizer.note:
        console.print(found.detokenizer.note, highlight=False)
    for example in view.examples:
        line = Text(f"{example.value:6.1f}  {example.side} of {example.pair_id}  ", style="bold")
        console.print(line + _shaded(example.pieces, example.value, example.position))
    tokens = ", ".join(f"{text.strip() or text!r} {count}" for text, count, _ in view.top_tokens)
    console.print(Text(f"at the tokens: {tokens}"))
    if effect is not None:
        for name, found_tokens in effect._asdict().items():
            line = ", ".join(f"{one.text} {one.effect:+.2g}" for one in found_tokens)
            console.print(Text(f"logits {name}: {line}"))


@app.command("pairs")
def pairs(
    cache: Cache,
    where: Where = None,
    offset: Annotated[int, typer.Option(min=0, help="Begin with this one.")] = 0,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows.")] = 20,
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: AsParquet = None,
) -> None:
    """List the pairs of a cache with their metadata.

    \b
    Examples:
      fpo cache pairs quickstart --where topic=maths
      fpo cache pairs quickstart --where topic!=maths --where "score>=4"
      fpo cache pairs quickstart --where topic=           pairs without a topic
    """
    from explorer import open_store
    from explorer.index import open_pair_index
    from explorer.pairs import pair_frame, pair_list

    found = open_store(store).features(cache)
    numbers = _matching(found, where)
    rows = pair_list(found, open_pair_index(found), offset, limit, numbers)
    told = f"{found.n_pairs:,} pairs" if numbers is None else _told(found, numbers, where)
    frame = pair_frame(found, rows)
    _give(frame, f"{found.name}: {told}", as_json=as_json, parquet=parquet)


@app.command("pair")
def pair(
    cache: Cache,
    pair_id: Annotated[str, typer.Argument(metavar="PAIR", help="16 hex digits.")],
    shade: Annotated[
        int | None, typer.Option("--feature", metavar="FEATURE", help="Shade tokens by it.")
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: AsParquet = None,
) -> None:
    """One pair: prompt, both responses, and the features in which they differ most."""
    from cli.show import new_table, print_json
    from explorer import open_store
    from explorer.index import open_pair_index
    from explorer.labels import Labels
    from explorer.pairs import pair_view
    from explorer.text import visible

    opened = open_store(store)
    found = opened.features(cache)
    labels = Labels(opened.store, found.sae)
    view = pair_view(found, open_pair_index(found), pair_id, shade, labels)
    if parquet is not None:
        rows = [{**one._asdict(), "difference": one.difference} for one in view.differing]
        _write_parquet(pl.DataFrame(rows), parquet)
        return
    if as_json:
        print_json(view)
        return
    console = Console()
    left_out = f"({view.prompt_left_out} tokens before) " if view.prompt_left_out else ""
    for name, value in view.metadata.items():
        console.print(Text(f"{visible(name)}  ", style="bold") + Text(_cell(value)))
    console.print(Text("prompt    ", style="bold") + Text(left_out + "".join(view.prompt)))
    top = max([piece.value for piece in (*view.chosen, *view.rejected)], default=0.0)
    for name, pieces in (("chosen", view.chosen), ("rejected", view.rejected)):
        console.print(Text(f"{name:<10}", style="bold") + _shaded(pieces, top, None))
    table = new_table("feature", "label", "chosen", "rejected", "difference")
    for one in view.differing:
        numbers = (f"{value:.2f}" for value in (one.chosen, one.rejected, one.difference))
        table.add_row(str(one.feature), Text(one.label), *numbers)
    console.print(table)


@app.command("diff")
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="A cache.")],
    other: Annotated[
        str, typer.Argument(metavar="B", help="Another one, or policy/VERSION trained with A.")
    ],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Rows.")] = 20,
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: AsParquet = None,
) -> None:
    """Two caches: of one SAE how its features changed; of two, on one set of pairs, which match.

    Or the reference's cache and a policy: how the features moved on the held-out pairs, from its
    evaluation, with 95 % intervals, effect sizes and q.

    \b
    Examples:
      fpo cache diff features/bef5 features/13cb
      fpo cache diff quickstart policy/29c9
    """
    from cli.show import with_interval
    from explorer import open_store
    from explorer.diff import diff_caches, match_features
    from explorer.index import open_feature_index
    from explorer.moved import policy_changes

    opened = open_store(store)
    a = opened.features(one)
    if other.startswith(("policy/", "evaluation/")):
        frame, title = policy_changes(opened, a, other), f"{other} against the reference, {a.name}"
        if parquet is None and not as_json:
            frame = with_interval(frame)
    elif a.sae.identity == (b := opened.features(other)).sae.identity:
        frame, title = diff_caches(a, b), f"{b.name} against {a.name}"
    else:
        frame = match_features(a, b, open_feature_index(a), open_feature_index(b))
        title = f"features of {b.name} that fire like those of {a.name}"
    whole = parquet is not None
    _give(frame if whole else frame.head(limit), title, as_json=as_json, parquet=parquet)


@app.command("find")
def find(
    recipe: Annotated[
        str, typer.Argument(help="Whose model and first SAE: a name or a .yaml file.")
    ],
    positive: Annotated[
        Path,
        typer.Option("--positive", help="Texts of the domain: a line each, or JSONL's `text`."),
    ],
    negative: Annotated[Path, typer.Option("--negative", help="Texts like them without it.")],
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Features.")] = 10,
    group: AsGroup = None,
    name: Annotated[str, typer.Option(help="Of the group.")] = "found",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a setting; repeatable."),
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
    parquet: AsParquet = None,
) -> None:
    """Find the features of a domain, by texts that have it and texts that do not.

    A feature counts where it is among the strongest at single tokens of the positive texts more
    often than of the negative ones, and its average activation agrees (the paper's Section 5.3).

    \b
    Example:
      fpo cache find quickstart --positive lists.txt --negative prose.txt --group lists.yaml
    """
    from explorer.find import find_features, read_texts
    from explorer.group import check_name, group_yaml
    from explorer.labels import Labels
    from explorer.store import ExploredStore, sae_of_run
    from tasks.run import prepare_run

    check_name(name)
    texts = [read_texts(path) for path in (positive, negative)]
    run, _ = prepare_run(recipe, overrides or [], store, only="tokenize")
    frame = find_features(run, *texts).head(limit)
    labels = Labels(ExploredStore(run.store).store, sae_of_run(run))
    named = [labels.text(one) for one in frame["feature"].to_list()]
    frame = frame.insert_column(1, pl.Series("label", named, dtype=pl.String))
    if group is not None and frame.height:
        group.write_text(group_yaml(frame["feature"].to_list(), name), encoding="utf-8")
    title = f"{frame.height} features of {positive.name}, not of {negative.name}"
    _give(frame, title, as_json=as_json, parquet=parquet)


@app.command("label")
def label(
    cache: Cache,
    number: Annotated[
        int | None, typer.Argument(metavar="FEATURE", help="Its index.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Argument(help="What to call it; empty: nothing.", show_default=False)
    ] = None,
    neuronpedia: Annotated[
        Path | None, typer.Option("--import", metavar="FILE", help="Neuronpedia's export.")
    ] = None,
    store: StoreUrl = None,
) -> None:
    """Name a feature, or take over Neuronpedia's explanations; kept in the store.

    \b
    Examples:
      fpo cache label quickstart 849 "money owed"
      fpo cache label gemma2b --import gemma-2-2b_25-gemmascope-res-16k.jsonl.gz
    """
    from explorer import open_store
    from explorer.labels import Labels
    from fpo_core.errors import UsageError

    if (neuronpedia is None) == (number is None or text is None):
        raise UsageError("give FEATURE and TEXT, or --import FILE")
    opened = open_store(store)
    found = opened.features(cache)
    labels = Labels(opened.store, found.sae)
    if neuronpedia is not None:
        print(f"{labels.import_neuronpedia(neuronpedia):,} labels taken, {len(labels):,} there are")
        return
    assert number is not None
    found.check_feature(number)
    labels.set(number, text or "")
    print(f"{number}: {labels.text(number) or '(no label)'}")


@app.command("group")
def group(
    features: Annotated[list[int], typer.Argument(metavar="FEATURE...", help="Indices.")],
    name: Annotated[str, typer.Option(help="Of the group.")] = "group",
    weight: Annotated[float, typer.Option(min=0, help="In the constraint; 0: measured.")] = 1.0,
) -> None:
    """A feature group as the lines of a recipe that hold it."""
    from explorer.group import group_yaml

    print(group_yaml(features, name, weight), end="")


def _give(frame: pl.DataFrame, title: str, *, as_json: bool, parquet: Path | None) -> None:
    """A table as the person wants it."""
    from cli.show import new_table, print_json

    if parquet is not None:
        _write_parquet(frame, parquet)
        return
    if as_json:
        print_json(frame.to_dicts())
        return
    table = new_table(*(name.replace("_", " ") for name in frame.columns))  # which can be broken
    for row in frame.iter_rows():
        table.add_row(*(Text(_cell(value)) for value in row))
    console = Console()
    console.print(Text(title))
    console.print(table)


def _matching(cache: Any, where: list[str] | None) -> Any:
    """Return the numbers of the pairs that meet the conditions; None where none is given."""
    from explorer.metadata import matching_pairs, parse_conditions

    return matching_pairs(cache, parse_conditions(where, cache.metadata)) if where else None


def _told(cache: Any, numbers: Any, where: list[str] | None) -> str:
    conditions = " and ".join(where or ())
    return f"{len(numbers):,} of {cache.n_pairs:,} pairs, where {conditions}"


def _write_parquet(frame: pl.DataFrame, path: Path) -> None:
    if str(path) == "-":
        buffer = io.BytesIO()
        frame.write_parquet(buffer)
        sys.stdout.buffer.write(buffer.getvalue())
    else:
        frame.write_parquet(path)


def _cell(value: Any) -> str:
    from explorer.text import visible

    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.3g}" if isinstance(value, float) else visible(str(value), LONGEST_CELL)


def _shaded(pieces: Any, top: float, marked: int | None) -> Text:
    """Tokens on a background that says how strong the feature is at each."""
    line = Text()
    for piece in pieces:
        share = piece.value / top if top > 0 else 0.0
        shade = SHADES[min(len(SHADES) - 1, int(share * len(SHADES)) if share > 0 else 0)]
        bold = "bold " if piece.position == marked else ""
        style = (bold + shade).strip() or None
        line.append(piece.text, style=style if piece.scored else UNSCORED)
    return line


def _logits(opened: Any, cache: Any, feature: int) -> Any:
    from explorer.logits import LogitLens

    return LogitLens(opened.store, cache).effect(feature)


def _print_histogram(console: Console, histogram: Any) -> None:
    top = max(1, int(histogram.chosen.max()), int(histogram.rejected.max()))
    blocks = " ▁▂▃▄▅▆▇█"
    for name, counts, without in zip(
        ("chosen", "rejected"), (histogram.chosen, histogram.rejected), histogram.without,
        strict=True,
    ):  # fmt: skip
        bars = "".join(blocks[-(-int(count) * (len(blocks) - 1) // top)] for count in counts)
        console.print(
            f"{name:<9}0 {bars} {histogram.edges[-1]:.3g}   not in {without:,}", highlight=False
        )


def _size(count: int) -> str:
    from tasks.run import human_bytes

    return human_bytes(count)
