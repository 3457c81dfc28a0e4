"""What a recipe's data is like: columns, drops, lengths and the first rendered examples."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fpo_core.data.conversations.model import Conversation
from fpo_core.data.conversations.reader import Survey
from fpo_core.data.drops import REASONS
from fpo_core.data.lengths import EDGES
from fpo_core.data.metadata import metadata_columns
from fpo_core.data.mixture import (
    HELDOUT,
    TRAIN,
    SplitSource,
    Surveys,
    dialogue_sources,
    pair_sources,
    read_split,
)
from fpo_core.data.render import ChatFormat
from fpo_core.data.sources.addresses import shown
from fpo_core.data.sources.hub import hub_split
from fpo_core.data.sources.identity import Resolved, identify_data
from fpo_core.data.tokenization import Tokenization
from fpo_core.data.tokenize import TokenizedPair
from fpo_core.errors import FPOError
from fpo_core.models.load import load_tokenizer, model_folder
from fpo_core.models.source import identify
from fpo_core.progress import Progress
from fpo_core.recipe import Recipe
from storage.store import Store
from tasks.data_plan import rules_of
from tasks.plan import Plan

PLANNED_ROWS = 1000  # of each source that a plan reads
STAGES = {"instructions": "sft", "tokenize": "data"}


class Drop(NamedTuple):
    """How many rows or examples were left out for a reason, and the first of them."""

    reason: str
    text: str
    rows: int
    first: str
    remedy: str
    is_bad: bool


class ShownSide(NamedTuple):
    """A rendered answer in pieces."""

    pieces: tuple[tuple[str, bool], ...]  # text, and whether it is scored


class ShownExample(NamedTuple):
    """A rendered example, as a model reads it."""

    where: str
    split: str
    prompt: str
    sides: tuple[ShownSide, ...]


class DataCheck(NamedTuple):
    """What was found in one section of a recipe (`data` or `sft`)."""

    section: str
    stats: dict[str, Any]  # as the manifest of `pairs` has them
    drops: tuple[Drop, ...]
    examples: tuple[ShownExample, ...]
    edges: tuple[int, ...]  # of the length histograms' bins
    error: str | None  # why a run would stop


class PlannedSource(NamedTuple):
    """What the first rows of a source are like, or all of them where they were tokenized."""

    section: str
    split: str
    source: str
    rows: int
    is_sample: bool
    shapes: tuple[str, ...]
    unused: tuple[str, ...]
    dropped: int


def check_data(
    recipe: Recipe, section: str, shown: int, splits: Collection[str] = (TRAIN, HELDOUT)
) -> DataCheck:
    """Read and tokenize the sources of a section, as the stage would, and store nothing.

    Args:
        recipe: the recipe.
        section: `data` or `sft`.
        shown: examples to show.
        splits: the splits to check.

    Raises:
        FPOError: a source or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(_base_folder(recipe))
    chat = ChatFormat(tokenizer, recipe.data.template, recipe.data.date)
    settings = recipe.data if section == "data" else recipe.sft
    assert settings is not None
    rules = rules_of(recipe, settings, section)
    sources = {name: s for name, s in _sources_of(recipe, section).items() if name in splits}
    resolved = _resolved(sources)
    work = Tokenization(chat, sources, resolved, rules)
    examples: list[ShownExample] = []
    error = _missing_metadata(sources, resolved)
    with Progress(section, total=None, unit="example") as progress:
        for split in work.splits:
            try:
                for example in work.examples(split):
                    progress.advance(1)
                    if isinstance(example, TokenizedPair) and len(examples) < shown:
                        examples.append(_shown(example, split, tokenizer))
            except FPOError as found:
                if not work.surveys.by_source:
                    raise
                error = error or str(found)
    return DataCheck(
        section=section,
        stats=work.stats(),
        drops=_drops(work),
        examples=tuple(examples),
        edges=EDGES,
        error=error,
    )


def _resolved(sources: Mapping[str, Sequence[SplitSource]]) -> dict[str, Resolved]:
    """Return the files of the sources that are not local."""
    paths = dict.fromkeys(each.source.path for given in sources.values() for each in given)
    resolved: dict[str, Resolved] = {}
    for path in paths:
        found = identify_data(path)
        if not found.resolved:
            raise FPOError(
                f"data {path!r}: the hub does not answer. Check the name and the network"
            )
        if found.files is not None:
            resolved[path] = found.files
    return resolved


def _missing_metadata(
    sources: Mapping[str, Sequence[SplitSource]], resolved: Mapping[str, Resolved]
) -> str | None:
    """Return why a run would stop at the recipe's metadata columns, None if it would not."""
    try:
        metadata_columns(sources, resolved)
    except FPOError as error:
        return str(error)
    return None


def _base_folder(recipe: Recipe) -> Path:
    source, revision = recipe.model.source, recipe.model.revision
    return model_folder(source, identify(source, revision).commit or revision)


def _sources_of(recipe: Recipe, section: str) -> dict[str, list[SplitSource]]:
    """Return the sources of each split of a section."""
    if section == "data":
        return pair_sources(recipe.data)
    assert recipe.sft is not None
    return dialogue_sources(recipe.sft)


def _drops(work: Tokenization) -> tuple[Drop, ...]:
    """Return the drops by reason, most frequent first."""
    found: dict[str, Drop] = {}
    for pair in work.dropped:
        known = found.get(pair.reason)
        if known is not None:
            found[pair.reason] = known._replace(rows=known.rows + 1)
            continue
        reason = REASONS[pair.reason]
        found[pair.reason] = Drop(
            reason=pair.reason,
            text=reason.text,
            rows=1,
            first=f"{pair.where}: {pair.detail}",
            remedy=reason.remedy,
            is_bad=reason.bad,
        )
    return tuple(sorted(found.values(), key=lambda drop: -drop.rows))


def planned_sources(recipe: Recipe, plan: Plan, store: Store) -> list[PlannedSource]:
    """Say what a recipe's sources are like, from the store or from their first rows.

    Sources on the hub that are not in the store yet are left out: a plan fetches no data.
    """
    found: list[PlannedSource] = []
    for stage, section in STAGES.items():
        if stage not in plan.stages:
            continue
        planned = plan.stages[stage]
        if planned.state == "complete":
            stats = store.artifact(planned.artifact, planned.version).manifest["stats"]
            found += _from_stats(section, stats)
        else:
            found += _from_first_rows(recipe, plan, section)
    return found


def _from_stats(section: str, stats: dict[str, Any]) -> Iterator[PlannedSource]:
    # Artifacts of earlier versions say nothing of their sources.
    for source in stats.get("sources", ()):
        yield PlannedSource(
            section=section,
            split=source["split"],
            source=source["source"],
            rows=source["rows"],
            is_sample=False,
            shapes=tuple(source["shapes"]),
            unused=tuple(source["unused_columns"]),
            dropped=sum(source["dropped"].values()),
        )


def _from_first_rows(recipe: Recipe, plan: Plan, section: str) -> Iterator[PlannedSource]:
    for split, sources in _sources_of(recipe, section).items():
        for each in sources:
            path = each.source.path
            if hub_split(path):
                continue
            surveys = Surveys()
            whole = each._replace(heldout=None)
            rows = read_split(split, [whole], plan.resolved, surveys)
            survey = surveys.of(split, path)
            is_sample = _read_rows(rows, survey)
            yield PlannedSource(
                section=section,
                split=split,
                source=shown(path),
                rows=survey.rows,
                is_sample=is_sample,
                shapes=tuple(survey.shapes),
                unused=tuple(survey.unused),
                dropped=sum(survey.dropped.values()),
            )


def _read_rows(found: Iterator[Conversation | Any], survey: Survey) -> bool:
    """Read rows until enough were seen; returns whether some may be left."""
    return any(survey.rows >= PLANNED_ROWS for _ in found)


def _shown(example: TokenizedPair, split: str, tokenizer: Any) -> ShownExample:
    sides = [(example.chosen_ids, example.chosen_unscored)]
    if example.rejected_ids:
        sides.append((example.rejected_ids, example.rejected_unscored))
    return ShownExample(
        where=example.conversation.where,
        split=split,
        prompt=tokenizer.decode(example.prompt_ids),
        sides=tuple(ShownSide(_pieces(ids, ranges, tokenizer)) for ids, ranges in sides),
    )


def _pieces(
    ids: Sequence[int], ranges: Sequence[int], tokenizer: Any
) -> tuple[tuple[str, bool], ...]:
    """Return a side's text in runs of scored and unscored tokens."""
    edges = [0, *ranges, len(ids)]
    pieces: list[tuple[str, bool]] = []
    scored = True
    for start, stop in zip(edges, edges[1:], strict=False):
        if stop > start:
            pieces.append((tokenizer.decode(ids[start:stop]), scored))
        scored = not scored
    return tuple(pieces)
