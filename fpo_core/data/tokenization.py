"""Tokenize all splits of a recipe's data and keep count of what became of every row."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_core.data.conversations.fields import NOTES
from fpo_core.data.conversations.reader import Survey
from fpo_core.data.drops import REASONS, DroppedPair
from fpo_core.data.lengths import Lengths
from fpo_core.data.mixture import (
    HELDOUT,
    SplitSource,
    Surveys,
    check_bad_share,
    read_split,
    told_reasons,
    without_leaks,
)
from fpo_core.data.render import ChatFormat
from fpo_core.data.sources.identity import Resolved
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.errors import FPOError
from fpo_core.recipe.data import SystemRule

log = logging.getLogger("fpo.stage")

TOLD_ROWS = 3
_DID_NOT_FIT = ("too_long", "prompt_too_long")
Example = TokenizedPair | DroppedPair


class Rules(NamedTuple):
    """What the recipe says about rows that do not fit."""

    limits: Limits
    system: SystemRule
    max_bad_share: float
    limit: int | None  # most examples of each split


class Tokenization:
    """The examples of all splits, in order, with counts.

    Args:
        chat: chat template and tokenizer.
        splits: the sources of each split; `heldout` comes after `train`.
        resolved: the files of sources that are not local, by path.
        rules: what happens to rows that do not fit.

    Attributes:
        pairs: examples by split.
        dropped: what was left out, in order.
        surveys: what the rows were like, by split and source.
        before: lengths of all examples that were tokenized, before anything was cut or dropped.
        after: lengths of the examples that are kept.
    """

    def __init__(
        self,
        chat: ChatFormat,
        splits: Mapping[str, Sequence[SplitSource]],
        resolved: Mapping[str, Resolved],
        rules: Rules,
    ) -> None:
        self.splits, self.resolved, self.rules = splits, resolved, rules
        self.tokenizer = Tokenizer(chat, rules.limits, rules.system)
        self.surveys = Surveys()
        self.dropped: list[DroppedPair] = []
        self.pairs: Counter[str] = Counter()
        self.before, self.after = Lengths(), Lengths()
        self.scored_tokens = 0
        self._train_prompts: set[int] = set()

    def examples(self, split: str) -> Iterator[Example]:
        """Tokenize one split; what is dropped is yielded and counted.

        Raises:
            FPOError: nothing is left, or too many rows are unusable for one reason.
        """
        first = len(self.dropped)
        found = read_split(split, self.splits[split], self.resolved, self.surveys, self.rules.limit)
        if split == HELDOUT:
            found = without_leaks(found, self._train_prompts)
        for example in self.tokenizer.tokenize(found):
            self._count(example, split)
            yield example
        self._check(split, self.dropped[first:])

    def _count(self, example: Example, split: str) -> None:
        if example.lengths is not None:
            self.before.add(example.lengths)
        if isinstance(example, DroppedPair):
            self.dropped.append(example)
            return
        self.pairs[split] += 1
        self.scored_tokens += example.num_scored
        self.after.add(example.kept_lengths)
        if split != HELDOUT:
            self._train_prompts.add(example.conversation.prompt_key)

    def _check(self, split: str, dropped: list[DroppedPair]) -> None:
        if not self.pairs[split]:
            raise FPOError(_nothing_left(split, dropped, self.rules.limits.section))
        rows = sum(survey.rows for (of, _), survey in self._surveys() if of == split)
        check_bad_share(split, rows, dropped, self.rules.max_bad_share)

    def _surveys(self) -> list[tuple[tuple[str, str], Survey]]:
        return list(self.surveys.by_source.items())

    def stats(self) -> dict[str, Any]:
        """Return the counts as plain values, for a manifest."""
        after = self.after
        return {
            "pairs": dict(self.pairs),
            "dropped": dict(Counter(pair.reason for pair in self.dropped)),
            "tokens": after.prompt_tokens + after.answer_tokens,
            "answer_tokens": self.scored_tokens,
            "notes": dict(self.notes),
            "lengths": {"before": self.before.as_json(), "after": after.as_json()},
            "sources": [
                # The name without its folder: a manifest holds no machine's paths.
                {"split": split, "source": path.rstrip("/").rpartition("/")[2], **survey.as_json()}
                for (split, path), survey in self._surveys()
            ],
        }

    @property
    def notes(self) -> Counter[str]:
        """Return examples by note, of reading and of rendering."""
        found = Counter(self.tokenizer.notes)
        for _, survey in self._surveys():
            found.update(survey.notes)
        return +found

    def report(self) -> None:
        """Log what was left out, unused or changed."""
        for (_, path), survey in self._surveys():
            if survey.unused:
                names = ", ".join(f"{name!r}" for name in survey.unused)
                columns = "column" if len(survey.unused) == 1 else "columns"
                log.warning(
                    "%s: %s %s not used (data.metadata keeps columns with the pairs)",
                    path,
                    f"{columns} {names}",
                    "is" if len(survey.unused) == 1 else "are",
                )
        for note, count in self.notes.items():
            log.info("%s: %s", _examples(count), NOTES[note])
        reasons = Counter(pair.reason for pair in self.dropped)
        for reason, count in reasons.items():
            log.info("%s dropped: %s", _examples(count), REASONS[reason].text)
        for pair in self.dropped[:TOLD_ROWS]:
            log.info("  %s: %s", pair.where, pair.detail)
        if len(self.dropped) > TOLD_ROWS:
            log.info("  ... all are listed in the artifact's dropped.jsonl")
        self._report_lengths(sum(reasons[reason] for reason in _DID_NOT_FIT))

    def _report_lengths(self, too_long: int) -> None:
        before, after, limits = self.before, self.after, self.rules.limits
        if not too_long or before.mean_answer is None or after.mean_answer is None:
            return
        log.warning(
            "%d of %d examples do not fit %s.max_length=%d and were dropped; the mean answer went "
            "from %.0f to %.0f tokens. %s.truncation=keep_end and %s.truncate_answers=true keep "
            "them",
            too_long,
            before.examples,
            limits.section,
            limits.max_length,
            before.mean_answer,
            after.mean_answer,
            limits.section,
            limits.section,
        )


def _examples(count: int) -> str:
    return f"{count:,} pair" + "s" * (count != 1)


def _nothing_left(split: str, dropped: list[DroppedPair], section: str) -> str:
    if not dropped:
        return f"no example of the {split} split is left: its sources hold no rows for it"
    told = f"no example of the {split} split is left. Dropped (settings of `{section}`):"
    return told + told_reasons(dropped)
