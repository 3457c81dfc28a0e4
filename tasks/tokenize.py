"""Stage ``tokenize``: preference data -> the ``pairs`` artifact."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

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

SPLITS = ("train", "heldout")
NAMED_IN_ERROR = 3


@task(name="tokenize", task_run_name="tokenize", cache_policy=NO_CACHE)
def tokenize(run: PipelineRun) -> Outcome:
    """Tokenize the recipe's pairs into aligned shards."""
    return announce(run.bring_about("tokenize", lambda writer: _tokenize(run, writer)))


def _tokenize(run: PipelineRun, writer: ArtifactWriter) -> Work:
    settings = run.recipe.data
    chat = ChatFormat(load_tokenizer(run.model_path()), settings.template)
    limits = Limits(settings.max_prompt_length, settings.max_length)
    dropped: list[DroppedPair] = []
    counts: Counter[str] = Counter()
    shard: list[dict] = []
    number = tokens = 0
    finished = writer.finished_shards()

    def flush() -> None:
        nonlocal number, shard
        if shard and number not in finished:
            writer.put_shard(number, {"": pa.Table.from_pylist(shard, schema=PAIRS)})
        number += bool(shard)
        shard = []

    train_ids: set[str] = set()
    with Progress("tokenize", total=None, unit="pair") as progress:
        for split in SPLITS:
            exclude, before = frozenset(train_ids), len(dropped)
            for pair in tokenize_pairs(_pairs(run, split), chat, limits, exclude=exclude):
                progress.advance(1)
                if isinstance(pair, DroppedPair):
                    dropped.append(pair)
                    continue
                if split == "train":
                    train_ids.add(pair.pair_id)
                counts[split] += 1
                tokens += len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
                shard.append(_row(pair, split))
                if len(shard) == settings.shard_pairs:
                    flush()
            if not counts[split]:
                raise FPOError(_nothing_left(split, dropped[before:]))
        flush()
    writer.put_bytes(
        "dropped.jsonl",
        "".join(json.dumps(pair._asdict()) + "\n" for pair in dropped).encode(),
    )
    reasons = Counter(pair.reason for pair in dropped)
    if dropped:
        _tell_dropped(dropped, reasons)
    return Work({"pairs": dict(counts), "dropped": dict(reasons), "tokens": tokens}, tokens)


def _pairs(run: PipelineRun, split: str) -> Iterator[PreferencePair]:
    sources = run.recipe.data.train if split == "train" else run.recipe.data.heldout
    hub = run.plan.hub
    every = (pair for source in sources for pair in read_pairs(source, hub.get(source)))
    return islice(every, run.recipe.data.limit)


def _row(pair: TokenizedPair, split: str) -> dict:
    # The file's name without its folder: a manifest and its tables hold no machine's paths.
    return {
        "pair_id": pair.pair_id,
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "split": split,
        "source": pair.where.rpartition("/")[2],
    }


def _nothing_left(split: str, dropped: list[DroppedPair]) -> str:
    reasons = Counter(pair.reason for pair in dropped)
    told = "; ".join(f"{count} because {REASONS[reason]}" for reason, count in reasons.items())
    first = "; ".join(f"{pair.where}: {pair.detail}" for pair in dropped[:NAMED_IN_ERROR])
    return (
        f"no pair of the {split} split is left: {told or 'the files hold none'}. First: {first}. "
        f"Raise data.max_length or data.max_prompt_length, or mend the data"
    )


def _tell_dropped(dropped: list[DroppedPair], reasons: Counter[str]) -> None:
    """Say which pairs were left out; the whole list is in the artifact's dropped.jsonl."""
    for reason, count in reasons.items():
        log.info("%d pair%s dropped: %s", count, "s" * (count > 1), REASONS[reason])
    for pair in dropped[:NAMED_IN_ERROR]:
        log.info("  %s: %s", pair.where, pair.detail)
    if len(dropped) > NAMED_IN_ERROR:
        log.info("  ... all are listed in the artifact's dropped.jsonl")
