"""The splits of a recipe's data: several sources, weights, held-out prompts, leakage, bad rows."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from fpo_core.data.conversations.model import Conversation, share_of
from fpo_core.data.conversations.reader import Reading, Survey, read_source
from fpo_core.data.drops import REASONS, DroppedPair
from fpo_core.data.sources.addresses import shown
from fpo_core.data.sources.identity import Resolved
from fpo_core.errors import FPOError
from fpo_core.recipe.data import DataSettings, HeldoutShare, SourceSettings
from fpo_core.recipe.training import SftSettings

Found = Conversation | DroppedPair

TRAIN, HELDOUT = "train", "heldout"
SHOWN_BAD = 3
# A source whose first rows are all unusable is not what the recipe takes it for.
GIVE_UP_ROWS = 1000


class SplitSource(NamedTuple):
    """A source as one split reads it."""

    source: SourceSettings
    reading: Reading
    heldout: tuple[float, bool] | None  # share of held-out prompts, and whether these are wanted

    @property
    def is_second_reading(self) -> bool:
        """Whether the training split reads the same rows, and reports on them."""
        return self.heldout is not None and self.heldout[1]


@dataclass
class Surveys:
    """Surveys of all sources, by split and path."""

    by_source: dict[tuple[str, str], Survey] = field(default_factory=dict)

    def of(self, split: str, path: str) -> Survey:
        """Return the survey of a source, made when it is first asked for."""
        return self.by_source.setdefault((split, shown(path)), Survey())


def pair_sources(settings: DataSettings) -> dict[str, list[SplitSource]]:
    """Return the sources of the training and the held-out pairs."""

    def reading(source: SourceSettings) -> Reading:
        return Reading(
            columns=settings.columns if source.columns is None else source.columns,
            metadata=settings.metadata,
            pairs_per_prompt=settings.pairs_per_prompt,
        )

    share = settings.heldout.fraction if isinstance(settings.heldout, HeldoutShare) else None
    return {
        TRAIN: [
            SplitSource(source, reading(source), None if share is None else (share, False))
            for source in settings.train
        ],
        HELDOUT: [
            SplitSource(source, reading(source), None if share is None else (share, True))
            for source in settings.heldout_sources
        ],
    }


def dialogue_sources(settings: SftSettings) -> dict[str, list[SplitSource]]:
    """Return the sources of the warm start's dialogues."""
    return {
        TRAIN: [
            SplitSource(
                source,
                Reading(
                    columns=settings.columns if source.columns is None else source.columns,
                    turns=settings.turns,
                ),
                None,
            )
            for source in settings.data
        ]
    }


def read_split(
    split: str,
    sources: Sequence[SplitSource],
    resolved: Mapping[str, Resolved],
    surveys: Surveys,
    limit: int | None = None,
) -> Iterator[Found]:
    """Read the conversations of a split, source after source.

    Args:
        split: its name, for the surveys.
        sources: where from.
        resolved: the files of sources on the hub or elsewhere, by path.
        surveys: are filled in.
        limit: most conversations; what is dropped does not count.

    Raises:
        FPOError: a source that cannot be read, or whose first rows are all unusable.
    """
    left = limit
    for each in sources:
        survey = surveys.of(split, each.source.path)
        found = _of_source(each, resolved.get(each.source.path), survey)
        for item in _limited(found, _least(left, each.source.limit)):
            if left is not None and isinstance(item, Conversation):
                left -= 1
            yield item
        if left == 0:
            return


def _of_source(each: SplitSource, resolved: Resolved | None, survey: Survey) -> Iterator[Found]:
    usable = False
    dropped: list[DroppedPair] = []
    read = Survey() if each.is_second_reading else survey
    for item in read_source(each.source.path, resolved, each.reading, read):
        survey.rows = read.rows
        if isinstance(item, DroppedPair):
            if not each.is_second_reading:
                yield item
            if not usable and REASONS[item.reason].bad:
                dropped.append(item)
                if len(dropped) >= GIVE_UP_ROWS:
                    raise FPOError(_all_unusable(each.source.path, dropped))
            continue
        usable = True
        passed_over = _passed_over(each, item)
        if passed_over is None:
            yield item
        else:
            survey.passed_over[passed_over] += 1


def _passed_over(each: SplitSource, item: Conversation) -> str | None:
    """Return why a split does not take an example, a key of `PASSED_OVER`; None if it does."""
    weight = each.source.weight
    if weight < 1 and share_of(int(item.pair_id, 16), "weight") >= weight:
        return "weight"
    if each.heldout is None:
        return None
    share, wanted = each.heldout
    is_heldout = share_of(item.prompt_key, "heldout") < share
    return None if is_heldout is wanted else "other_split"


def _limited(found: Iterator[Found], limit: int | None) -> Iterator[Found]:
    if limit is None:
        yield from found
        return
    for item in found:
        if isinstance(item, Conversation):
            if limit == 0:
                return
            limit -= 1
        yield item
        if limit == 0:
            return


def _least(one: int | None, other: int | None) -> int | None:
    given = [number for number in (one, other) if number is not None]
    return min(given, default=None)


def _all_unusable(path: str, dropped: list[DroppedPair]) -> str:
    return (
        f"data {shown(path)!r}: none of the first {len(dropped):,} rows can be used. "
        f"They were dropped:{told_reasons(dropped)}"
    )


def without_leaks(found: Iterable[Found], train_prompts: set[int]) -> Iterator[Found]:
    """Drop held-out pairs whose prompt is in the training data.

    Args:
        found: held-out conversations.
        train_prompts: `prompt_key` of every training conversation.
    """
    for item in found:
        if isinstance(item, Conversation) and item.prompt_key in train_prompts:
            text = REASONS["in_train"].text
            yield DroppedPair(item.pair_id, "in_train", item.where, text)
        else:
            yield item


def check_bad_share(split: str, rows: int, dropped: Sequence[DroppedPair], most: float) -> None:
    """Raise where one reason made too many rows unusable.

    Args:
        split: the split's name, for the message.
        rows: rows read.
        dropped: what was dropped of them.
        most: largest share per reason; one row is always allowed unless it is 0.

    Raises:
        FPOError: with a table of the reasons and the first rows of each.
    """
    bad = [item for item in dropped if REASONS[item.reason].bad]
    counts = Counter(item.reason for item in bad)
    allowed = max(most * rows, 1) if most else 0
    over = [reason for reason, count in counts.items() if count > allowed]
    if over:
        raise FPOError(
            f"{len(bad):,} of {rows:,} rows of the {split} split cannot be used:"
            f"{told_reasons(bad)}To go on without them, raise data.max_bad_share={most:g}"
        )


def told_reasons(dropped: Sequence[DroppedPair]) -> str:
    """Return a table of reasons: how many, why, the first row of each, and what to do."""
    lines: list[str] = []
    by_reason: dict[str, list[DroppedPair]] = {}
    for item in dropped:
        by_reason.setdefault(item.reason, []).append(item)
    for reason, items in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        first = items[0]
        lines.append(f"\n  {len(items):,} x {REASONS[reason].text}")
        lines.append(f"\n      first: {first.where}: {first.detail}")
        if REASONS[reason].remedy:
            lines.append(f"\n      {REASONS[reason].remedy}")
    return "".join(lines) + "\n"


def first_conversations(
    sources: Sequence[SplitSource], resolved: Mapping[str, Resolved], count: int
) -> list[Conversation]:
    """Return the first conversations of some sources, for an estimate."""
    found = read_split("", sources, resolved, Surveys())
    return list(islice((item for item in found if isinstance(item, Conversation)), count))
