"""The offline pass behind the ``reference`` and ``features`` stages.

When several of their artifacts are missing, one forward pass a shard feeds them all: the first
stage also writes the others' shards, and each of those, when its turn comes, finds their receipts
and only has to merge the statistics and commit. All stay separately versioned and resumable.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from fpo_core.memory import release_gpu_memory
from fpo_core.models.load import inference_device, load_model, prepare_cpu
from fpo_core.progress import Progress, not_shown
from fpo_core.recipe import Recipe
from fpo_core.sae.source import sae_folder
from storage.artifact import Artifact
from storage.backend import always
from storage.schemas import (
    FEATURES_POOLED,
    FEATURES_SHARD_STATS,
    FEATURES_TOKENS,
    REFERENCE,
)
from storage.writer import ArtifactWriter
from tasks.arrow import to_table
from tasks.fanout import ShardDone, Todo, fan_out
from tasks.gate import gate_sae, is_gated, sae_name
from tasks.plan import Plan, features_stages
from tasks.run import PipelineRun, recipe_store

if TYPE_CHECKING:
    from fpo_core.data.batches import PairIds
    from fpo_core.features.tables import FeatureColumns
    from fpo_core.offline import PassedShard
    from fpo_core.sae.coder import SparseCoder

log = logging.getLogger("fpo.stage")

Tables = dict[str, pa.Table]


class ComputedShard(NamedTuple):
    """A shard that the model is done with; its tables are not made yet."""

    shard: int
    stages: tuple[str, ...]  # whose features are in it, in the order of the SAEs
    passed: "PassedShard"


class OfflineWorker:
    """The reference and the SAEs, loaded once; computes shards and writes their tables.

    Receipts are left to who holds the artifacts: a shard's tables are the same whoever writes them.

    Args:
        run: the pipeline run.
        writers: of the stages that are wanted.
        decoders: whether the SAEs keep theirs, which the gate alone reads.
    """

    def __init__(
        self, run: PipelineRun, writers: Mapping[str, ArtifactWriter], *, decoders: bool = True
    ) -> None:
        from fpo_core.models.budget import token_budget
        from fpo_core.offline import WantedFeatures

        self._run, self._writers, recipe = run, writers, run.recipe
        self._pairs = run.artifact("tokenize")
        prepare_cpu(recipe.resources.threads)
        self._model = load_model(
            run.reference_folder(), dtype=recipe.model.dtype, attention=recipe.model.attention,
            device=inference_device(),
        )  # fmt: skip
        # All of them: one that does not fit is told before the first hour, not before its own.
        coders = [
            attached_coder(run, self._model, number, decoder=decoders)
            for number in range(len(recipe.hookpoints))
        ]
        self._saes: dict[str, WantedFeatures] = {
            stage: WantedFeatures(
                coder.to(str(self._model.device)), hookpoint, recipe.features,
                recipe.train.pinned if number == 0 else (),
            )
            for number, (stage, coder, hookpoint) in enumerate(
                zip(features_stages(recipe), coders, recipe.hookpoints, strict=True)
            )
            if stage in writers
        }  # fmt: skip
        self._budget = token_budget(
            self._model, recipe.resources.inference.tokens_per_batch, 2 * recipe.data.max_length
        )

    def gate(self) -> None:
        """Measure the SAEs where they are to read, before they read.

        Raises:
            FPOError: one is not in its place.
        """
        for number, stage in enumerate(features_stages(self._run.recipe)):
            if stage in self._saes:
                coder, place = self._saes[stage].coder, sae_path(self._run, number)
                gate_sae(self._run, self._writers[stage], self._model, coder, number, place)
                only_encodes = coder._replace(W_dec=None)
                self._saes[stage] = self._saes[stage]._replace(coder=only_encodes)

    def compute(self, todo: Todo, on_tokens: Callable[[int], None] = not_shown) -> ComputedShard:
        """The model's part in the missing tables of a shard.

        Args:
            todo: which.
            on_tokens: told how many tokens were done after each batch.
        """
        from fpo_core.data.batches import check_vocabulary
        from fpo_core.logprobs import output_head
        from fpo_core.offline import pass_shard

        pairs = read_pair_ids(self._pairs.table(shard=todo.shard))
        # The head, not the configuration: a multimodal one has its text model's inside.
        check_vocabulary(pairs, len(output_head(self._model).weight))
        stages = tuple(stage for stage in self._saes if stage in todo.stages)
        passed = pass_shard(
            self._model, pairs, [self._saes[stage] for stage in stages],
            want_reference="reference" in todo.stages, budget=self._budget, on_tokens=on_tokens,
        )  # fmt: skip
        return ComputedShard(todo.shard, stages, passed)

    def write(self, computed: ComputedShard) -> ShardDone:
        """Make a shard's tables and put them into the store."""
        return write_shard(computed, self._writers)

    def run(self, work: Todo) -> ShardDone:
        """Compute a shard and write it."""
        return self.write(self.compute(work))


def write_shard(computed: ComputedShard, writers: Mapping[str, ArtifactWriter]) -> ShardDone:
    """Make a shard's tables and put them into the store, without receipts.

    Args:
        computed: the shard.
        writers: by stage; ``reference`` where its log-probs were wanted.
    """
    scores = computed.passed.scores()
    tables = {
        stage: feature_tables(columns)
        for stage, columns in zip(computed.stages, scores.features, strict=True)
    }
    if scores.reference is not None:
        tables["reference"] = {"": to_table(scores.reference, REFERENCE)}
    receipts = {
        stage: writers[stage].put_tables(computed.shard, its_tables)
        for stage, its_tables in tables.items()
    }
    return ShardDone(scores.tokens, receipts)


def feature_tables(columns: "FeatureColumns") -> Tables:
    """A shard's tables of one SAE, by name."""
    return {
        "pooled": to_table(columns.pooled, FEATURES_POOLED),
        "tokens": to_table(columns.tokens, FEATURES_TOKENS),
        "shard_stats": to_table(columns.stats, FEATURES_SHARD_STATS),
    }


class OfflineJob(NamedTuple):
    """What another process needs to compute the shards of a run; picklable, without secrets."""

    recipe: Recipe
    store: str
    plan: Plan
    stages: tuple[str, ...]
    folder: str  # where the recipe's relative paths start

    @classmethod
    def of(cls, run: PipelineRun, stages: Iterable[str]) -> "OfflineJob":
        """The job of some stages of a run."""
        url = run.store.url
        place = url if "://" in url else str(Path(url).expanduser().absolute())
        return cls(run.recipe, place, run.plan, tuple(stages), str(Path.cwd()))

    def worker(self) -> OfflineWorker:
        """Open the store and load model and SAEs."""
        if Path(self.folder).is_dir():  # on another machine the paths are absolute ones
            os.chdir(self.folder)
        store = recipe_store(self.recipe, self.store)
        run = PipelineRun(self.recipe, store, self.plan, frozenset())
        planned = {stage: run.planned(stage) for stage in self.stages}
        # The artifacts are held by who started the workers, and alone writes the receipts.
        writers = {
            stage: ArtifactWriter(store.backend, one.artifact, one.version, _HeldElsewhere())
            for stage, one in planned.items()
        }
        return OfflineWorker(run, writers, decoders=False)


class _HeldElsewhere:
    """The right to write that another process has, and checks."""

    check = staticmethod(always)


def score_shards(run: PipelineRun, writers: Mapping[str, ArtifactWriter]) -> int:
    """Compute and write the missing shards of some stages' artifacts, all in one pass.

    Args:
        run: the pipeline run.
        writers: by stage.

    Returns:
        Tokens processed.
    """
    pairs = run.artifact("tokenize")
    todo = _missing(pairs.num_shards(), writers)
    if not todo:
        return 0
    _check_budget(run, pairs, todo)
    tokens = 0
    with Progress(" + ".join(writers), total=_expected(pairs, todo), unit="token") as progress:
        for done in _finished(run, writers, todo, progress):
            tokens += done.tokens
    return tokens


def _finished(
    run: PipelineRun,
    writers: Mapping[str, ArtifactWriter],
    todo: Sequence[Todo],
    progress: Progress,
) -> Iterator[ShardDone]:
    """The shards as they are finished and have their receipts, in this process or on Ray."""
    settings = run.recipe.resources.inference
    if settings.runner == "local":
        worker = OfflineWorker(run, writers)
        worker.gate()
        yield from in_process(worker, writers, todo, progress.advance)
        return
    if not all(
        is_gated(writers[stage]) for stage in features_stages(run.recipe) if stage in writers
    ):
        OfflineWorker(run, writers).gate()  # here, once: not by every worker
        release_gpu_memory()
    job = OfflineJob.of(run, writers)
    for done in fan_out(job, todo, settings):
        _put_receipts(writers, done)
        progress.advance(done.tokens)
        yield done


def _missing(shards: int, writers: Mapping[str, ArtifactWriter]) -> list[Todo]:
    done = {stage: writer.finished_shards().keys() for stage, writer in writers.items()}
    every = (
        Todo(shard, tuple(stage for stage, finished in done.items() if shard not in finished))
        for shard in range(shards)
    )
    return [work for work in every if work.stages]


def _check_budget(run: PipelineRun, pairs: Artifact, todo: Sequence[Todo]) -> None:
    """Refuse a budget that the recipe gives and that some pair exceeds, before the first pass."""
    from fpo_core.models.budget import TokenBudget

    given = run.recipe.resources.inference.tokens_per_batch
    if given == "auto":
        return
    shards = (read_pair_ids(pairs.table(shard=work.shard)) for work in todo)
    longest = (max(shard, key=lambda pair: pair.length) for shard in shards)
    TokenBudget(given).check([max(longest, key=lambda pair: pair.length)])


def _expected(pairs: Artifact, todo: Sequence[Todo]) -> int | None:
    """Tokens of the shards, as far as the whole artifact's tell: to show how much is left."""
    tokens = pairs.manifest["stats"].get("tokens")
    return tokens and round(tokens * len(todo) / pairs.num_shards())


def _put_receipts(writers: Mapping[str, ArtifactWriter], done: ShardDone) -> None:
    for stage, receipt in done.receipts.items():
        writers[stage].put_receipt(receipt)


class _Worker(Protocol):
    """Computes shards, and writes them."""

    def compute(self, todo: Todo, on_tokens: Callable[[int], None], /) -> ComputedShard: ...

    def write(self, computed: ComputedShard, /) -> ShardDone: ...


def in_process(
    worker: _Worker,
    writers: Mapping[str, ArtifactWriter],
    todo: Sequence[Todo],
    on_tokens: Callable[[int], None],
) -> Iterator[ShardDone]:
    """Shard after shard; one's tables are made and written while the model is at the next.

    An error in the next one finds it finished: leaving the thread's context waits for it.
    """

    def finish(computed: ComputedShard) -> ShardDone:
        done = worker.write(computed)
        _put_receipts(writers, done)
        return done

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as thread:
        last: Future[ShardDone] | None = None
        for work in todo:
            computed = worker.compute(work, on_tokens)
            if last:
                yield last.result()
            last = thread.submit(finish, computed)
        if last:
            yield last.result()


def read_pair_ids(table: pa.Table) -> list["PairIds"]:
    """Return the pairs of a shard of ``pairs``."""
    from fpo_core.data.pair_shard import read_pair_shard

    shard = read_pair_shard(table)
    return [shard.pair(row) for row in range(table.num_rows)]


def sae_path(run: PipelineRun, sae: int = 0) -> Path:
    """The folder of one of the recipe's SAEs: a stored one, or what the ``sae`` stage made."""
    source = _sae_source(run, sae)
    return run.artifact("sae").folder("sae") if source is None else sae_folder(source)


def _sae_source(run: PipelineRun, sae: int) -> str | None:
    settings = run.recipe.sae
    return settings.source if sae == 0 else settings.also[sae - 1].source


def attached_coder(
    run: PipelineRun, model: Any, sae: int = 0, *, decoder: bool = True
) -> "SparseCoder":
    """One of the recipe's SAEs, checked against the model it is to read.

    Args:
        run: the pipeline run.
        model: the model.
        sae: which of the recipe's.
        decoder: whether to keep the decoder.

    Raises:
        FPOError: when it does not fit the model.
    """
    from fpo_core.sae.coder import load_coder

    coder = load_coder(sae_path(run, sae), decoder=decoder)
    check_attached(run, model, coder, sae)
    return coder


def check_attached(run: PipelineRun, model: Any, coder: "SparseCoder", sae: int) -> None:
    """Refuse an SAE that declares another place than the recipe's, or text that the pairs are not.

    Raises:
        FPOError: when it does not fit the model or its prompts.
    """
    from fpo_core.models.load import load_tokenizer
    from fpo_core.sae.coder import check_bos, check_fits

    name = sae_name(run, sae)
    check_fits(coder, model, run.recipe.hookpoints[sae], name)
    prompt = run.artifact("tokenize").table(shard=0)["prompt_ids"][0].as_py()
    # A warm start keeps the tokenizer.
    check_bos(coder, prompt, load_tokenizer(run.base_folder()).bos_token_id, name)
