"""What the judging of a run would cost, before anything is spent."""

from typing import NamedTuple

from fpo_core.bench.model import Answers
from fpo_core.errors import FPOError
from fpo_core.judge.cost import CHARACTERS_A_TOKEN, Estimate, estimate_cost
from storage.judgments import Judgments
from tasks.bench_plan import POLICY, PlannedBenchmark, planned_benchmarks
from tasks.benchmark import Contest, contests, requests_of
from tasks.run import PipelineRun


class JudgingCost(NamedTuple):
    """Of one benchmark."""

    benchmark: str
    estimate: Estimate
    answers: str  # "stored", or "longest" where they have still to be made


def judging_costs(run: PipelineRun) -> list[JudgingCost]:
    """The cost of each benchmark's verdicts, those that the store has left out; asks nothing.

    Raises:
        FPOError: nothing in the recipe is judged.
    """
    judge = run.recipe.judge
    judged = [one for one in planned_benchmarks(run.recipe) if one.rules.judged]
    if judge is None or not judged:
        missing = "no judge (judge.model)" if judge is None else "no benchmark that a judge scores"
        raise FPOError(f"recipe {run.recipe.name!r} has {missing}: judging costs nothing")
    found = []
    for planned in judged:
        is_stored = not any(run.missing(planned.answers_stage(m)) for m in planned.models)
        held = list(contests(run, planned)) if is_stored else _longest(run, planned)
        requests = [request for _, request in requests_of(planned, held).values()]
        cost = estimate_cost(judge, requests, Judgments(run.store.backend))
        found.append(JudgingCost(planned.pack.name, cost, "stored" if is_stored else "longest"))
    return found


def _longest(run: PipelineRun, planned: PlannedBenchmark) -> list[Contest]:
    """Contests of answers that are all as long as they may be, and all different."""
    longest = CHARACTERS_A_TOKEN * run.recipe.generation.max_new_tokens

    def made_up(model: str, temperature: float | None) -> Answers:
        baseline = planned.rules.baseline(planned.pack) if model not in planned.models else None
        return baseline or Answers(model, {
            question.id: tuple(
                f"{model} {temperature} {question.id} {turn} ".ljust(longest, "x")
                for turn in range(len(question.turns))
            )
            for question in planned.questions
        })  # fmt: skip

    return [
        Contest(
            temperature, made_up(POLICY, temperature), against,
            made_up(against, temperature) if against else None,
        )
        for temperature in planned.temperatures(run.recipe)
        for against in planned.opponents or (None,)
    ]  # fmt: skip
