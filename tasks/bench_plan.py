"""The stages of a recipe's benchmarks: whose answers are wanted, and what is scored with them.

``generate@PACK`` are the policy's answers, ``generate@PACK-OPPONENT`` another model's, made once
for all runs that compare with it; ``benchmark@PACK`` scores them. Answers follow from the questions
and not from the judge's prompts: with another judge they are reused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fpo_core.bench.kinds import KINDS
from fpo_core.bench.model import Benchmark, Question
from fpo_core.bench.pack import Pack, load_pack
from fpo_core.errors import FPOError
from fpo_core.recipe import Recipe
from fpo_core.recipe.benchmarks import BASELINE, REFERENCE, BenchmarkSettings
from storage.store import Store

POLICY = "policy"
Add = Callable[[str, Mapping[str, Any], Mapping[str, str]], str]


class PlannedBenchmark(NamedTuple):
    """A benchmark of a recipe, its pack read."""

    settings: BenchmarkSettings
    pack: Pack
    rules: Benchmark

    @property
    def questions(self) -> list[Question]:
        """Those that are asked."""
        return self.rules.questions(self.pack)[: self.settings.limit]

    @property
    def own(self) -> dict[str, float] | None:
        """Each question's temperature by its id, where the benchmark's authors fixed them."""
        if self.settings.temperatures == "generation":
            return None
        found = {question.id: self.rules.temperature(question) for question in self.questions}
        fixed = {name: value for name, value in found.items() if value is not None}
        return fixed if len(fixed) == len(found) else None

    def temperatures(self, recipe: Recipe) -> tuple[float | None, ...]:
        """Of the answers that are scored, each by itself; None: the questions' own."""
        return recipe.generation.temperatures if self.own is None else (None,)

    @property
    def models(self) -> list[str]:
        """Whose answers have to be made: the policy's and, for a judge, its opponents'."""
        return [POLICY, *(name for name in self.opponents if name != BASELINE)]

    @property
    def opponents(self) -> tuple[str, ...]:
        """Whom the policy is compared with; nobody where the rules check answers alone.

        Where models are rated alone there is no baseline, only others that are rated as well.
        """
        if not self.rules.judged:
            return ()
        return tuple(n for n in self.settings.against if self.rules.paired or n != BASELINE)

    @property
    def stage(self) -> str:
        """The stage that scores."""
        return f"benchmark@{self.pack.name}"

    def answers_stage(self, model: str) -> str:
        """The stage that makes a model's answers."""
        ending = "" if model == POLICY else f"-{model.replace('/', '-')}"
        return f"generate@{self.pack.name}{ending}"

    def is_scored(self, recipe: Recipe) -> bool:
        """Whether there is a judge, or none is needed."""
        return not self.rules.judged or recipe.judge is not None


def planned_benchmarks(recipe: Recipe) -> list[PlannedBenchmark]:
    """The recipe's benchmarks, their packs read and checked.

    Raises:
        FPOError: a pack is not there or is damaged, one is named twice, or an opponent's answers
            cannot be made.
    """
    found = []
    for settings in recipe.benchmarks:
        pack = load_pack(settings.pack)
        if pack.name in {other.pack.name for other in found}:
            raise FPOError(f"benchmarks: two packs are named {pack.name!r}; list each once")
        found.append(PlannedBenchmark(settings, pack, KINDS[pack.kind]))
        if recipe.generation.backend == "openai" and found[-1].models != [POLICY]:
            raise FPOError(
                f"benchmarks, {pack.name}: generation.backend=openai answers with the one model of "
                f"its endpoint; against={','.join(found[-1].models[1:])} needs `transformers` or "
                f"`vllm`"
            )
        _check_opponents(found[-1])
    return found


def _check_opponents(benchmark: PlannedBenchmark) -> None:
    name, opponents = benchmark.pack.name, benchmark.opponents
    if benchmark.rules.judged and benchmark.rules.paired and not opponents:
        raise FPOError(f"benchmarks, {name}: say whom to compare with: against: [reference]")
    if BASELINE in opponents and benchmark.rules.baseline(benchmark.pack) is None:
        raise FPOError(
            f"benchmarks, {name}: its pack has no baseline's answers; say whom else to compare "
            f"with: against: [reference]"
        )


def add_benchmarks(
    recipe: Recipe,
    reference: str,
    policy: str,
    store: Store,
    add: Add,
    dated: Mapping[str, str],
) -> None:
    """Plan the stages of a recipe's benchmarks.

    Args:
        recipe: the recipe.
        reference: identity of the reference model.
        policy: the policy's artifact version.
        store: where other policies are.
        add: plans a stage from its settings and inputs, and returns its version.
        dated: the date that prompts are rendered with, where the template writes one.

    Raises:
        FPOError: a pack or an opponent that is not there, or a question that cannot be scored.
    """
    for benchmark in planned_benchmarks(recipe):
        _check_policies(benchmark, store)
        questions = questions_digest(benchmark.questions)
        answers = {}
        for model in benchmark.models:
            source = {POLICY: f"artifact:policy/{policy}", REFERENCE: reference}.get(
                model, f"artifact:{model}"
            )
            version = add(
                benchmark.answers_stage(model),
                {**_generation(recipe, benchmark), **dated},
                {"model": source, "questions": questions},
            )
            role = "answers" if model == POLICY else f"answers of {model}"
            answers[role] = f"artifact:answers/{version}"
        if benchmark.is_scored(recipe):
            inputs = {"policy": policy, **answers, "pack": benchmark.pack.digest}
            scores = add(benchmark.stage, _scoring(recipe, benchmark), inputs)
            if store.state("scores", scores) != "complete":
                # Now, and not once everything is answered.
                benchmark.rules.check(benchmark.pack, benchmark.settings.limit)


def _generation(recipe: Recipe, benchmark: PlannedBenchmark) -> dict[str, Any]:
    """What changes answers: of the endpoint its model's name, not its address."""
    part = recipe.generation.model_dump(exclude={"base_url", "key_env"})
    if benchmark.own is not None:
        part["temperatures"] = benchmark.own
    part |= recipe.model.model_dump(include={"dtype", "attention"})
    return {**part, "template": recipe.data.template}


def _scoring(recipe: Recipe, benchmark: PlannedBenchmark) -> dict[str, Any]:
    part = recipe.evaluation.model_dump(include={"bootstrap", "seed"})
    part |= {"against": list(benchmark.opponents), "limit": benchmark.settings.limit}
    part["template"] = benchmark.rules.template_digest(benchmark.pack)
    if benchmark.rules.judged and recipe.judge:
        part["judge"] = recipe.judge.identity
    return part


def evaluation_questions(recipe: Recipe) -> list[Question] | None:
    """The questions that the evaluation samples answers to; None: held-out prompts are answered.

    Raises:
        FPOError: the pack is not there or is damaged.
    """
    source, settings = recipe.evaluation.questions, recipe.evaluation
    if source is None:
        return None
    pack = load_pack(source)
    return KINDS[pack.kind].questions(pack)[: settings.prompts]


def questions_digest(questions: Sequence[Question]) -> str:
    """sha256 over what is asked: the identity of questions, whatever pack they are of."""
    text = json.dumps([question._asdict() for question in questions], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_policies(benchmark: PlannedBenchmark, store: Store) -> None:
    for name in benchmark.models:
        if name not in (POLICY, REFERENCE) and store.state(*name.split("/")) != "complete":
            raise FPOError(
                f"benchmarks, {benchmark.pack.name}: against {name}, which the store has not; `fpo "
                f"store ls` lists its policies"
            )


def notices(recipe: Recipe) -> Iterator[str]:
    """What the user of a recipe's benchmarks is to be told, a sentence each."""
    judged = [one for one in planned_benchmarks(recipe) if one.rules.judged]
    for benchmark in judged:
        if not benchmark.is_scored(recipe):
            yield (
                f"{benchmark.pack.name}: no judge is configured, so its answers are stored and "
                f"not scored. Set judge.model (and judge.base_url), then run the same command"
            )
    policies = {recipe.model.source, recipe.generation.model} - {None}
    if judged and recipe.judge and recipe.judge.model in policies:
        yield f"the judge, {recipe.judge.model}, is the model it judges: it may favour its own kind"
