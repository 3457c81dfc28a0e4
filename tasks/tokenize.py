"""Stages ``tokenize`` and ``instructions``: text -> token ids, for training and for `sft`."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.data.instructions import read_instructions
from fpo_core.data.pairs import PreferencePair, read_pairs
from fpo_core.data.tokenize import (
    REASONS,
    ChatFormat,
    DroppedPair,
    Limits,
    TokenizedPair,
    tokenize_pairs,
)
from fpo_core.errors import FPOError
from fpo_core.models.load import load_tokenizer
from fpo_core.progress import Progress
from storage.schemas import PAIRS
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.run import Outcome, PipelineRun, Work

log = logging.getLogger("fpo.stage")

NAMED_IN_ERROR = 3


@task(name="tokenize", task_run_name="tokenize", cache_policy=NO_CACHE)
def tokenize(run: PipelineRun) -> Outcome:
    """Tokenize the recipe's pairs into aligned shards."""
    return announce(run.bring_about("tokenize", lambda writer: _pairs(run, writer)))


@task(name="instructions", task_run_name="instructions", cache_policy=NO_CACHE)
def instructions(run: PipelineRun) -> Outcome:
    """Tokenize the dialogues of the supervised warm start."""
    return announce(run.bring_about("instructions", lambda writer: _instructions(run, writer)))


def _pairs(run: PipelineRun, writer: ArtifactWriter) -> Work:
    data = run.recipe.data
    hub = run.plan.resolved
    sources = {"train": data.train, "heldout": data.heldout}
    splits = {
        split: islice(
            (pair for name in names for pair in read_pairs(name, hub.get(name))), data.limit
        )
        for split, names in sources.items()
    }
    return _tokenize(run, writer, splits, Limits(data.max_prompt_length, data.max_length))


def _instructions(run: PipelineRun, writer: ArtifactWriter) -> Work:
    sft = run.recipe.sft
    assert sft is not None
    hub = run.plan.resolved
    every = (
        answer for name in sft.data for answer in read_instructions(name, sft.turns, hub.get(name))
    )
    limits = Limits(sft.max_prompt_length, sft.max_length, "sft")
    return _tokenize(run, writer, {"train": islice(every, sft.limit)}, limits)


def _tokenize(
    run: PipelineRun,
    writer: ArtifactWriter,
    splits: Mapping[str, Iterable[PreferencePair]],
    limits: Limits,
) -> Work:
    """Write shards of token ids, split after split, and the list of what was left out."""
    settings = run.recipe.data
    chat = ChatFormat(load_tokenizer(run.base_folder()), settings.template)
    dropped: list[DroppedPair] = []
    counts: Counter[str] = Counter()
    tokens = answer_tokens = 0
    train_ids: set[str] = set()

    def rows() -> Iterator[dict]:
        nonlocal tokens, answer_tokens
        for split, pairs in splits.items():
            exclude, before = frozenset(train_ids), len(dropped)
            for pair in tokenize_pairs(pairs, chat, limits, exclude=exclude):
                progress.advance(1)
                if isinstance(pair, DroppedPair):
                    dropped.append(pair)
                    continue
                if split == "train":
                    train_ids.add(pair.pair_id)
                counts[split] += 1
                answers = len(pair.chosen_ids) + len(pair.rejected_ids)
                answer_tokens += answers
                tokens += len(pair.prompt_ids) + answers
                yield _row(pair, split)
            if not counts[split]:
                raise FPOError(_nothing_left(split, dropped[before:], limits))

    with Progress(writer.stage, total=None, unit="pair") as progress:
        finished, every = writer.finished_shards(), rows()
        number = 0
        while shard := list(islice(every, settings.shard_pairs)):
            if number not in finished:
                writer.put_shard(number, {"": pa.Table.from_pylist(shard, schema=PAIRS)})
            number += 1
    writer.put_bytes(
        "dropped.jsonl",
        "".join(json.dumps(pair._asdict()) + "\n" for pair in dropped).encode(),
    )
    reasons = Counter(pair.reason for pair in dropped)
    if dropped:
        _tell_dropped(dropped, reasons)
    stats = {
        "pairs": dict(counts), "dropped": dict(reasons), "tokens": tokens,
        "answer_tokens": answer_tokens,
    }  # fmt: skip
    return Work(stats, tokens)


def _row(pair: TokenizedPair, split: str) -> dict:
    # The file's name without its folder: a manifest and its tables hold no machine's paths.
    return {
        "pair_id": pair.pair_id,
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "chosen_unscored": [],
        "rejected_unscored": [],
        "split": split,
        "source": pair.where.rpartition("/")[2],
    }


def _nothing_left(split: str, dropped: list[DroppedPair], limits: Limits) -> str:
    reasons = Counter(pair.reason for pair in dropped)
    told = "; ".join(f"{count} because {REASONS[reason]}" for reason, count in reasons.items())
    first = "; ".join(f"{pair.where}: {pair.detail}" for pair in dropped[:NAMED_IN_ERROR])
    return (
        f"no pair of the {split} split is left: {told or 'the files hold none'}. First: {first}. "
        f"Raise {limits.section}.max_length or {limits.section}.max_prompt_length, or mend the data"
    )


def _tell_dropped(dropped: list[DroppedPair], reasons: Counter[str]) -> None:
    """Say which pairs were left out; the whole list is in the artifact's dropped.jsonl."""
    for reason, count in reasons.items():
        log.info("%d pair%s dropped: %s", count, "s" * (count > 1), REASONS[reason])
    for pair in dropped[:NAMED_IN_ERROR]:
        log.info("  %s: %s", pair.where, pair.detail)
    if len(dropped) > NAMED_IN_ERROR:
        log.info("  ... all are listed in the artifact's dropped.jsonl")
