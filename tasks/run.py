"""One pipeline run: recipe, store and plan, and how a stage is brought about.

``PipelineRun.bring_about`` is the pattern of every stage: reuse the artifact when it is there,
otherwise compute what is missing of it, commit it, and say what happened.
"""

import datetime as dt
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fpo_core.data.render import ChatFormat
from fpo_core.data.sources.addresses import shown_deep
from fpo_core.errors import FPOError, Preempted, Terminated
from fpo_core.judge import check_judge
from fpo_core.memory import release_gpu_memory
from fpo_core.models.load import model_folder
from fpo_core.models.source import identify
from fpo_core.recipe import Recipe, load_recipe
from fpo_core.sae.source import sae_folder
from fpo_core.tracking import check_wandb
from fpo_core.training.hosts import run_hosts
from storage.artifact import Artifact
from storage.backend import Hold
from storage.errors import ArtifactMissing, StoreError
from storage.location import open_store, store_url
from storage.manifest import Made
from storage.provenance import provenance
from storage.store import Store
from storage.writer import ArtifactWriter
from tasks.bench_plan import notices
from tasks.cluster import check_ray
from tasks.plan import SCHEMA_VERSIONS, Plan, StagePlan, kind_of, make_plan, selected_stages
from tasks.transfer import local_folder

log = logging.getLogger("fpo.stage")


class Work(NamedTuple):
    """What computing a stage reports beside its files."""

    stats: dict[str, Any]
    tokens: int = 0  # processed, for the rate


class Outcome(NamedTuple):
    """What became of a stage in this run."""

    stage: str
    artifact: str
    version: str
    state: Literal["computed", "resumed", "reused"]
    rows: int | None
    bytes: int
    seconds: float
    tokens_per_second: float
    inputs: dict[str, str]

    @property
    def reference(self) -> str:
        """``artifact/version``, the way to name it on the command line."""
        return f"{self.artifact}/{self.version}"


class PipelineRun:
    """A recipe on a store, planned; handed from task to task.

    Args:
        recipe: the checked recipe.
        store: where artifacts live.
        plan: the stages' versions.
        force: stages whose artifacts are computed again even though they exist.
    """

    def __init__(self, recipe: Recipe, store: Store, plan: Plan, force: frozenset[str]) -> None:
        self.recipe, self.store, self.plan = recipe, store, plan
        self._force = set(force)
        self._begun: set[str] = set()
        self._run_id: str | None = None  # while it is recorded

    def planned(self, stage: str) -> StagePlan:
        """The plan of a stage."""
        return self.plan.stages[stage]

    def artifact(self, stage: str) -> Artifact:
        """The finished artifact of an earlier stage."""
        planned = self.planned(stage)
        return self.store.artifact(planned.artifact, planned.version)

    def missing(self, stage: str) -> bool:
        """Whether a stage's artifact has still to be computed."""
        planned = self.planned(stage)
        return stage in self._force or (
            self.store.state(planned.artifact, planned.version) != "complete"
        )

    def _writer(self, stage: str, hold: Hold) -> ArtifactWriter:
        """A writer for a stage's artifact; the old one is discarded first when forced."""
        planned = self.planned(stage)
        if stage in self._force:
            self.store.discard(planned.artifact, planned.version)
            self._force.discard(stage)
        self._begun.add(stage)
        return self.store.writer(planned.artifact, planned.version, hold)

    @contextmanager
    def writers_beside(self, stages: Sequence[str]) -> Iterator[dict[str, ArtifactWriter]]:
        """Writers for artifacts that another stage's pass can feed as well, by stage.

        Without those that are there, or that another run is making just now.
        """
        with ExitStack() as stack:
            writers = {}
            for stage in stages:
                planned = self.planned(stage)
                hold = stack.enter_context(self.store.hold(planned.artifact, planned.version, None))
                if hold and self.missing(stage):
                    writers[stage] = self._writer(stage, hold)
            yield writers

    def base_folder(self) -> Path:
        """The recipe's model, at the very commit that the versions were made with."""
        source, revision = self.recipe.model.source, self.recipe.model.revision
        return model_folder(source, identify(source, revision).commit or revision)

    def chat_format(self, tokenizer: Any) -> ChatFormat:
        """Return the recipe's chat template with the date of this run's versions."""
        date = self.plan.date
        return ChatFormat(tokenizer, self.recipe.data.template, date and date.date)

    def record_date(self) -> None:
        """Record the date that the template writes, before anything is rendered with it.

        Raises:
            FPOError: another run recorded another day meanwhile.
        """
        date = self.plan.date
        if date is None or date.is_recorded:
            return
        recorded = self.store.record_date(date.data, date.date)
        if recorded != date.date:
            raise FPOError(
                f"another run first tokenized this data on {recorded}, this one planned with "
                f"{date.date}. Run the same command again"
            )

    def reference_folder(self) -> Path:
        """The reference model: what the warm start made of the recipe's model, where it has one."""
        if self.recipe.sft is None:
            return self.base_folder()
        return local_folder(self.artifact("sft"), "model")

    def bring_about(self, stage: str, compute: Callable[[ArtifactWriter], Work]) -> Outcome:
        """Make sure that a stage's artifact exists.

        Args:
            stage: the stage's name.
            compute: writes what is missing through the writer it is given.

        Returns:
            What happened. Also recorded under the recipe's refs.
        """
        planned = self.planned(stage)
        outcome = self._compute(planned, compute) if self.missing(stage) else None
        if outcome is None:
            outcome = _outcome(planned, self.artifact(stage), "reused", 0.0, 0.0)
        if "@" not in stage:  # a recipe's ref to its features is to those of its first SAE
            self.store.set_ref(self.recipe.name, planned.artifact, planned.version)
        log.info("%s", describe(outcome))
        return outcome

    def _compute(
        self, planned: StagePlan, compute: Callable[[ArtifactWriter], Work]
    ) -> Outcome | None:
        """Compute and commit; None when another run has done it while this one waited."""
        stage = planned.stage
        begun_in_this_run = stage in self._begun  # by the pass that feeds two artifacts

        def tell() -> None:
            log.info("%s: another run is making %s, waiting for it", stage, planned.artifact)

        with self.store.hold(planned.artifact, planned.version, tell) as hold:
            assert hold is not None
            if not self.missing(stage):
                return None
            writer = self._writer(stage, hold)
            earlier = writer.finished_shards() or writer.checkpoints().names()
            resumed = bool(earlier) and not begun_in_this_run
            started = time.monotonic()
            work = compute(writer)
            release_gpu_memory()  # training's workers are processes of their own
            seconds = time.monotonic() - started
            rate = work.tokens / max(seconds, 1e-9)
            told = {"tokens_per_second": round(rate, 1)} if rate else {}  # `fpo plan` goes by it
            artifact = writer.commit(
                Made(
                    SCHEMA_VERSIONS[kind_of(stage)], planned.recipe, planned.inputs,
                    {**work.stats, **told}, seconds, provenance(),
                )
            )  # fmt: skip
        return _outcome(planned, artifact, "resumed" if resumed else "computed", seconds, rate)

    def reuse(self, stages: Sequence[str]) -> dict[str, Outcome] | None:
        """What became of the stages, when all are done already; else None, and nothing happened."""
        if any(self.missing(stage) for stage in stages):
            return None
        with self.recorded(stages):
            return {stage: self.bring_about(stage, _never) for stage in stages}

    def told(self, stage: str, state: Literal["computed", "reused"]) -> Outcome:
        """What became of a stage that another process of this run has seen to."""
        return _outcome(self.planned(stage), self.artifact(stage), state, 0.0, 0.0)

    def keep_file(self, path: Path) -> str:
        """Keep a file with this run's record; returns its key in the store."""
        assert self._run_id is not None, "outside of a recorded run"
        return self.store.put_run_file(self._run_id, path)

    @contextmanager
    def recorded(self, stages: Sequence[str]) -> Iterator[None]:
        """Record this run in the store, first as running, then with what became of it.

        Written before the run looks for what it can reuse, so that `fpo store gc` keeps that.
        """
        if any(kind_of(stage) in ("generate", "benchmark") for stage in stages):
            for sentence in notices(self.recipe):
                log.warning("%s", sentence)
        started = dt.datetime.now(dt.UTC)
        run_id = f"{started:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        record = {
            "run": run_id,
            "started": started.isoformat(timespec="seconds"),
            "state": "running",
            "recipe": self.recipe.name,
            "settings": shown_deep(self.recipe.model_dump(mode="json", exclude_unset=True)),
            "stages": list(stages),
            "artifacts": {
                stage: f"{planned.artifact}/{planned.version}"
                for stage, planned in self.plan.stages.items()
            },
            "provenance": provenance(),
        }
        self.store.put_run(run_id, record)
        self._run_id = run_id
        state = "failed"
        try:
            yield
            state = "complete"
        except BaseException as error:
            state = _state_after(error)
            raise
        finally:
            ended = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
            with suppress(StoreError):  # the error that ended the run is the one to tell
                self.store.put_run(run_id, {**record, "state": state, "ended": ended})


def prepare_run(
    recipe: str,
    overrides: Sequence[str],
    store: str | None,
    *,
    first: str | None = None,
    only: str | None = None,
    kinds: Collection[str] = (),
    force: bool = False,
) -> tuple[PipelineRun, list[str]]:
    """Read the recipe, open the store, plan, and select: all that can fail before work begins.

    Args:
        recipe: a shipped recipe's name, or the path of a YAML file.
        overrides: ``key.path=value`` settings.
        store: the store's URL; ``FPO_STORE``'s or the recipe's where it is None.
        first: bring about this stage and the later ones.
        only: bring about this stage alone.
        kinds: bring about the stages of these kinds, instead of either.
        force: compute the selected stages again.

    Returns:
        The run and the stages it is to bring about, in order.

    Raises:
        FPOError: a recipe, model, SAE or data file that is not there or not valid, or a package
            that a setting needs.
        StoreError: a store that cannot be opened or written.
    """
    settings = load_recipe(recipe, overrides)
    check_wandb(settings.monitor.wandb)
    artifacts = recipe_store(settings, store)
    artifacts.check_writable()
    plan = make_plan(settings, artifacts)
    saes = [s for s in (settings.sae.source, *(more.source for more in settings.sae.also)) if s]
    if plan.unresolved and {*plan.unresolved} <= {f"sae {source}" for source in saes}:
        for source in saes:
            sae_folder(source)  # its content enters the versions: it has to be here first
        plan = make_plan(settings, artifacts)
    if plan.unresolved:
        raise FPOError(
            f"not reachable from here: {', '.join(plan.unresolved)}. Check the name, your access "
            f"(HF_TOKEN) and the network, or give a local copy (a dataset's split as a Parquet or "
            f"JSONL file)"
        )
    stages = selected_stages(plan, first, only, kinds)
    if any(kind_of(stage) in ("reference", "features") for stage in stages):
        check_ray(settings.resources.inference)
    run = PipelineRun(settings, artifacts, plan, frozenset(stages if force else ()))
    if settings.judge and any(kind_of(s) == "benchmark" and run.missing(s) for s in stages):
        check_judge(settings.judge)  # its key, before the hours ahead of the first verdict
    if {"sft", "train"} & set(stages):
        run_hosts(settings.resources)  # a bad hostfile is told before the hours ahead of training
    return run, stages


def recipe_store(recipe: Recipe, given: str | None) -> Store:
    """The store that a recipe's runs use, unless the command or ``FPO_STORE`` names another."""
    place, url = recipe.store, store_url(given, recipe.store.url)
    if place.url not in (None, url):
        return open_store(url)  # the recipe's endpoint is that of its own store
    return open_store(url, endpoint=place.endpoint, region=place.region)


def _state_after(error: BaseException) -> str:
    """What became of a run that an exception ended."""
    from prefect.exceptions import TerminationSignal  # Prefect's exception for SIGTERM

    if isinstance(error, (Preempted, Terminated, TerminationSignal)):
        return "preempted"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _never(_writer: ArtifactWriter) -> Work:
    raise ArtifactMissing("an artifact was removed just now; run the same command again")


def _outcome(
    planned: StagePlan, artifact: Artifact, state: Any, seconds: float, rate: float
) -> Outcome:
    manifest: Mapping[str, Any] = artifact.manifest
    return Outcome(
        planned.stage, planned.artifact, planned.version, state, manifest["rows"],
        manifest["bytes"], seconds, rate, dict(planned.inputs),
    )  # fmt: skip


def describe(outcome: Outcome) -> str:
    """One line that says what became of a stage."""
    parts = [f"{outcome.stage:<12} {outcome.state:<9} {outcome.reference}"]
    if outcome.rows:
        parts.append(f"{outcome.rows:,} rows")
    parts.append(human_bytes(outcome.bytes))
    if outcome.state != "reused":
        parts.append(f"{outcome.seconds:.1f} s")
    if outcome.tokens_per_second:
        parts.append(f"{outcome.tokens_per_second:,.0f} tokens/s")
    return "  ".join(parts)


def human_bytes(count: int) -> str:
    """A size for people, in decimal units."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
