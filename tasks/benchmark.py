"""Stages ``benchmark@PACK``: answers, judged where a judge is needed -> the ``scores`` artifact.

Every judgment is kept in the store by its content as soon as it is there: a run that was killed,
or another one with the same answers, asks nothing twice.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl
from prefect import task
from prefect.cache_policies import NO_CACHE

from fpo_core.bench.model import Answers, Reply, Score, Scored
from fpo_core.errors import FPOError
from fpo_core.judge.client import Judge
from fpo_core.judge.wire import DECLINABLE
from fpo_core.progress import Progress
from fpo_core.recipe.benchmarks import BASELINE
from storage.judgments import Judgments
from storage.writer import ArtifactWriter
from tasks.announce import announce
from tasks.bench_plan import POLICY, PlannedBenchmark, planned_benchmarks
from tasks.generate import read_answers
from tasks.run import Outcome, PipelineRun, Work

log = logging.getLogger("fpo.stage")

UNREAD_SHARE = 0.1  # of verdicts: more of them unread, and the judge is called weak
SCORES, VERDICTS = "scores.json", "verdicts.parquet"


class Contest(NamedTuple):
    """The policy's answers at a temperature, and whose they are compared with."""

    temperature: float | None  # None: each question has the benchmark's own
    answers: Answers
    against: str | None  # as the recipe names the opponent
    opponent: Answers | None

    @property
    def name(self) -> str:
        """Keeps its requests apart from those of other contests."""
        at = "own" if self.temperature is None else f"{self.temperature:g}"
        return f"{at}/{self.against or '-'}"


@task(name="benchmark", task_run_name="{stage}", cache_policy=NO_CACHE)
def benchmark(run: PipelineRun, stage: str) -> Outcome:
    """Score the policy's answers to a benchmark's questions."""
    return announce(run.bring_about(stage, lambda writer: _benchmark(run, stage, writer)))


def benchmark_of(run: PipelineRun, stage: str) -> PlannedBenchmark:
    """The benchmark that a stage scores."""
    return next(one for one in planned_benchmarks(run.recipe) if one.stage == stage)


def contests(run: PipelineRun, planned: PlannedBenchmark) -> Iterator[Contest]:
    """Whose answers are compared, at each temperature."""

    def made_by(model: str, temperature: float | None) -> Answers:
        if model == BASELINE:
            baseline = planned.rules.baseline(planned.pack)
            assert baseline is not None  # checked when the run was planned
            return baseline
        artifact = run.artifact(planned.answers_stage(model))
        return read_answers(artifact, model, temperature)

    for temperature in planned.temperatures(run.recipe):
        answers = made_by(POLICY, temperature)
        for against in planned.opponents or (None,):
            opponent = made_by(against, temperature) if against else None
            yield Contest(temperature, answers, against, opponent)


def _benchmark(run: PipelineRun, stage: str, writer: ArtifactWriter) -> Work:
    planned = benchmark_of(run, stage)
    held = list(contests(run, planned))
    replies, notes = _ask(run, planned, held) if planned.rules.judged else ({}, {})
    settings = run.recipe.evaluation
    records, verdicts = [], []
    for contest in held:
        scored = planned.rules.score(
            planned.pack, contest.answers, contest.opponent, replies.get(contest.name, {}),
            limit=planned.settings.limit, resamples=settings.bootstrap, seed=settings.seed,
        )  # fmt: skip
        records.append(_record(run, planned, contest, scored, notes.get(contest.name, [])))
        place = {"temperature": contest.temperature, "opponent": records[-1]["opponent"]}
        verdicts += [{**place, **verdict} for verdict in scored.verdicts]
    path = writer.scratch() / VERDICTS
    pl.DataFrame(verdicts, infer_schema_length=None).write_parquet(path)
    writer.put_file(VERDICTS, path)
    writer.put_bytes(SCORES, (json.dumps(records, indent=2) + "\n").encode())
    return Work({"verdicts": len(verdicts), **_summary(records)})


def _ask(
    run: PipelineRun, planned: PlannedBenchmark, held: list[Contest]
) -> tuple[dict[str, dict[str, Reply]], dict[str, list[str]]]:
    """The judge's replies, by contest and request key, and what is to be said of them.

    A request that the endpoint does not take (its content filter, a text too long) is a verdict
    that is missing, and counted as such: asking again would never end.

    Raises:
        FPOError: the judge is out of reach, or did not answer some requests that it may yet.
    """
    settings = run.recipe.judge
    assert settings is not None  # the stage is planned with a judge only
    judge = Judge(settings, Judgments(run.store.backend))
    asked = requests_of(planned, held)
    replies: dict[str, dict[str, Reply]] = {contest.name: {} for contest in held}
    failures: dict[str, str] = {}
    refused: set[str] = set()
    declined: set[str] = set()
    while asked:
        with Progress(f"judgments by {settings.model}", total=len(asked), unit="judgment") as shown:
            judged = judge.ask([request for _, request in asked.values()], shown.advance)
        failures |= judged.failures
        refused |= judged.refused
        declined |= judged.declined
        for key, reply in judged.replies.items():
            contest, _ = asked[key]
            replies[contest][key.removeprefix(f"{contest}/")] = reply
        again = {}
        for contest in replies:
            own = [
                request._replace(key=key.removeprefix(f"{contest}/"))
                for key, (name, request) in asked.items()
                if name == contest
            ]
            for request in planned.rules.follow_ups(own, replies[contest]):
                key = f"{contest}/{request.key}"
                again[key] = (contest, request._replace(key=key))
        asked = again
    open_ones = [key for key in failures if key not in refused] or (
        [] if any(replies.values()) else list(failures)
    )
    if open_ones:
        raise FPOError(
            f"{planned.pack.name}: the judge {settings.model} did not answer {len(open_ones)} "
            f"requests ({failures[open_ones[0]]}). What it answered is kept; run the same command "
            f"again to ask for the rest"
        )
    return replies, {
        contest.name: [*_declined_note(declined), *_refused_note(contest.name, failures)]
        for contest in held
    }


def _declined_note(declined: set[str]) -> Iterator[str]:
    for setting in sorted(declined):
        yield f"The judge takes no {setting}; sent instead: {DECLINABLE[setting]}."


def _refused_note(contest: str, failures: Mapping[str, str]) -> Iterator[str]:
    own = [reason for key, reason in failures.items() if key.startswith(f"{contest}/")]
    if own:
        yield (
            f"The judge's endpoint refused {len(own)} requests, whose verdicts are missing; the "
            f"first: {own[0]}."
        )


def requests_of(planned: PlannedBenchmark, held: list[Contest]) -> dict[str, tuple[str, Any]]:
    """What a judge is asked first: by key, the contest's name and the request."""
    found = {}
    for contest in held:
        for request in planned.rules.requests(
            planned.pack, contest.answers, contest.opponent, planned.settings.limit
        ):
            key = f"{contest.name}/{request.key}"
            found[key] = (contest.name, request._replace(key=key))
    return found


def _record(
    run: PipelineRun, planned: PlannedBenchmark, contest: Contest, scored: Scored,
    notes: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The figures of a contest, and the key that says with which others they can be compared."""
    part: Mapping[str, Any] = run.planned(planned.stage).recipe
    generation = run.planned(planned.answers_stage(POLICY)).recipe
    decoding = {name: generation[name] for name in ("max_new_tokens", "top_p", "samples")}
    opponent = contest.opponent.model if contest.opponent else None
    model = None  # the pack's digest tells which baseline it was
    if contest.against not in (None, BASELINE):
        model = run.planned(planned.answers_stage(contest.against)).inputs["model"]
    key = {
        "benchmark": planned.pack.name, "pack": planned.pack.digest, "limit": part["limit"],
        "template": part["template"], "judge": part.get("judge"), "opponent": opponent,
        "opponent_model": model, "temperature": contest.temperature,
        "chat_template": generation["template"], **decoding,
    }  # fmt: skip
    return {
        "key": key,
        "benchmark": planned.pack.name,
        "kind": planned.pack.kind,
        "opponent": opponent,
        "temperature": contest.temperature,
        "scores": [_score(score) for score in scored.scores],
        "notes": [*scored.notes, *notes, *_unread_note(scored.scores[0])],
    }


def _unread_note(score: Score) -> Iterator[str]:
    """Says of a judge that it is weak, by how many of its verdicts could be read."""
    if score.judged < (1 - UNREAD_SHARE) * score.asked:
        yield (
            f"Of {score.asked} verdicts {score.judged} could be read: this judge is weak at its "
            f"task, and these figures say little."
        )


def _score(score: Score) -> dict[str, Any]:
    """As JSON, which has no NaN: the value is None where nothing could be judged."""
    value = score.value if math.isfinite(score.value) else None
    return {**score._asdict(), "value": value}


def _summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """The first figure of each contest, for the manifest."""
    found = {}
    for record in records:
        if record["scores"]:
            first, temperature = record["scores"][0], record["temperature"]
            at = "" if temperature is None else f"at {temperature:g}"
            name = " ".join(filter(None, (first["name"], record["opponent"], at)))
            found[name] = first["value"]
    return found
