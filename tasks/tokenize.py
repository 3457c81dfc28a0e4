"""Stages ``tokenize`` and ``instructions``: text -> token ids, for training and for `sft`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.data.metadata import MetadataColumns, metadata_columns
from fpo_core.data.mixture import SplitSource, dialogue_sources, pair_sources
from fpo_core.data.tokenization import Rules, Tokenization
from fpo_core.data.tokenize import TokenizedPair
from fpo_core.models.load import load_tokenizer
from fpo_core.progress import Progress
from storage.schemas import pairs_schema
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.data_plan import rules_of
from tasks.run import Outcome, PipelineRun, Work

_ARROW = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}


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
    return _tokenize(run, writer, pair_sources(data), rules_of(run.recipe, data, "data"))


def _instructions(run: PipelineRun, writer: ArtifactWriter) -> Work:
    sft = run.recipe.sft
    assert sft is not None
    return _tokenize(run, writer, dialogue_sources(sft), rules_of(run.recipe, sft, "sft"))


def _tokenize(
    run: PipelineRun,
    writer: ArtifactWriter,
    splits: Mapping[str, Sequence[SplitSource]],
    rules: Rules,
) -> Work:
    """Write shards of token ids, split after split, and the list of what was left out."""
    resolved = run.plan.resolved
    run.record_date()
    chat = run.chat_format(load_tokenizer(run.base_folder()))
    work = Tokenization(chat, splits, resolved, rules)
    metadata = metadata_columns(splits, resolved)
    schema = pairs_schema({name: _ARROW[kind] for name, kind in metadata.stored.items()})
    with Progress(writer.stage, total=None, unit="pair") as progress:
        finished = writer.finished_shards()
        rows = _rows(work, metadata, progress)
        number = 0
        while shard := list(islice(rows, run.recipe.data.shard_pairs)):
            if number not in finished:
                writer.put_shard(number, {"": pa.Table.from_pylist(shard, schema=schema)})
            number += 1
    lines = [json.dumps(pair.as_json()) + "\n" for pair in work.dropped]
    writer.put_bytes("dropped.jsonl", "".join(lines).encode())
    work.report()
    stats = work.stats()
    return Work(stats, stats["tokens"])


def _rows(
    work: Tokenization, metadata: MetadataColumns, progress: Progress
) -> Iterator[dict[str, Any]]:
    for split in work.splits:
        for example in work.examples(split):
            progress.advance(1)
            if isinstance(example, TokenizedPair):
                yield {**_row(example, split), **metadata.row(example.conversation.metadata)}


def _row(pair: TokenizedPair, split: str) -> dict[str, Any]:
    return {
        "pair_id": pair.pair_id,
        "prompt_ids": pair.prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "chosen_unscored": pair.chosen_unscored,
        "rejected_unscored": pair.rejected_unscored,
        "split": split,
        # The file's name without its folder: a manifest and its tables hold no machine's paths.
        "source": pair.conversation.where.rpartition("/")[2],
    }
