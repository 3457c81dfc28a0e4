"""IFEval: whether answers follow instructions that a program can check (Zhou et al., 2023).

The checkers are those of ``lm-eval``, strict and loose (the best of eight clippings of an answer).
Two things are drawn at random there: ``langdetect`` samples, and a letter takes the place of one
that is none (two of the 541 prompts want "#" and "!"). Both are seeded here, so that equal answers
get equal verdicts.
"""

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fpo_core.bench.asked import asked_questions
from fpo_core.bench.model import Answers, JudgeRequest, Question, Reply, Score, Scored
from fpo_core.bench.pack import Pack
from fpo_core.bench.punkt import ENGLISH, NEEDED_BY, sentence_model
from fpo_core.data.sources import Row, read_sound_rows
from fpo_core.errors import FPOError

SEED = 0  # of langdetect, and of what a checker draws
_SOURCES = ("instructions.py", "instructions_registry.py", "instructions_util.py", "utils.py")
_PACKAGES = {
    "lm_eval": "lm-eval",
    "langdetect": "langdetect",
    "nltk": "nltk",
    "immutabledict": "immutabledict",
}


class IFEval:
    """The rules of IFEval.

    A pack's ``questions`` are JSONL rows with ``key``, ``prompt``, ``instruction_id_list`` and
    ``kwargs``, as IFEval's ``input_data.jsonl``; ``punkt_tab`` is NLTK's sentence model.
    """

    kind = "ifeval"
    judged = False
    paired = False

    def questions(self, pack: Pack) -> list[Question]:
        """The pack's prompts, in its order.

        Raises:
            FPOError: a row without its columns, or a key that comes twice.
        """
        return [
            Question(str(row.value["key"]), (row.value["prompt"],))
            for row in _read(pack.files["questions"])
        ]

    def temperature(self, question: Question) -> float | None:
        """None: the recipe says."""
        del question

    def check(self, pack: Pack, limit: int | None) -> None:
        """Whether the checkers know every instruction that is asked, and find what they need.

        Raises:
            FPOError: an instruction or argument that they do not know; a package or the sentence
                model missing.
        """
        checkers = load_checkers()
        rows = _read(pack.files["questions"])[:limit]
        for row in rows:
            _check_instructions(checkers, row)
        with _sentence_model(pack, rows):
            pass

    def baseline(self, pack: Pack) -> Answers | None:
        """None: models are checked alone."""
        del pack

    def template_digest(self, pack: Pack) -> str:
        """sha256 over the checkers' source, and the versions and seed of what they use.

        Raises:
            FPOError: packages missing.
        """
        del pack  # its prompts and arguments are in its own digest
        folder = _package()
        digest = hashlib.sha256()
        for name in _SOURCES:
            digest.update((folder / name).read_bytes())
        versions = [importlib.metadata.version(name) for name in ("langdetect", "nltk")]
        digest.update(json.dumps([*versions, SEED, ENGLISH]).encode())
        return digest.hexdigest()

    def requests(
        self, pack: Pack, answers: Answers, opponent: Answers | None, limit: int | None = None
    ) -> list[JudgeRequest]:
        """None: a program is the judge."""
        del pack, answers, opponent, limit
        return []

    def follow_ups(
        self, requests: Sequence[JudgeRequest], replies: Mapping[str, Reply]
    ) -> list[JudgeRequest]:
        """None."""
        del requests, replies
        return []

    def score(
        self,
        pack: Pack,
        answers: Answers,
        opponent: Answers | None,
        replies: Mapping[str, Reply],
        *,
        limit: int | None = None,
        resamples: int = 1000,
        seed: int = 0,
    ) -> Scored:
        """Shares of prompts and instructions followed, strict and loose, and by family.

        Args:
            pack: the prompts and their instructions.
            answers: the policy's.
            opponent: not used.
            replies: not used.
            limit: only the first so many prompts.
            resamples: of the bootstrap over prompts.
            seed: of the bootstrap.

        Raises:
            FPOError: answers that do not fit the prompts; an instruction or argument that the
                checkers do not know; a package or the sentence model missing.
        """
        del opponent, replies
        asked_questions(self.questions(pack), limit, answers)
        checkers = load_checkers()
        rows = _read(pack.files["questions"])[:limit]
        for row in rows:
            _check_instructions(checkers, row)
        verdicts: list[dict[str, Any]] = []
        with _sentence_model(pack, rows):
            for row in rows:
                (response,) = answers.turns[str(row.value["key"])]
                verdicts += _verdicts(checkers, row, response)
        return Scored(tuple(_scores(verdicts, resamples, seed)), tuple(verdicts))


@functools.cache
def load_checkers() -> ModuleType:
    """lm-eval's ``tasks.ifeval.utils``, imported without its download of the sentence model.

    Raises:
        FPOError: packages missing.
    """
    _package()
    importlib.import_module("lm_eval.tasks")
    # The module downloads and prints while it is imported, on local rank 0 only.
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        checkers = importlib.import_module("lm_eval.tasks.ifeval.utils")
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before
    importlib.import_module("langdetect").DetectorFactory.seed = SEED
    return checkers


def _package() -> Path:
    """The folder of lm-eval's checkers."""
    missing = [name for module, name in _PACKAGES.items() if not importlib.util.find_spec(module)]
    if missing:
        raise FPOError(
            f"IFEval needs {', '.join(missing)}, not installed: run "
            f"`pip install 'fpo-pipeline[eval]'` in this environment"
        )
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "tasks" / "ifeval"


def _sentence_model(pack: Pack, rows: Sequence[Row]) -> AbstractContextManager[None]:
    """NLTK's, where one of the rows is checked with it."""
    needed = any(set(NEEDED_BY) & set(row.value["instruction_id_list"]) for row in rows)
    return sentence_model(pack) if needed else nullcontext()


def _read(path: Path) -> list[Row]:
    """The rows, with the columns that are needed."""
    rows: dict[str, Row] = {}
    for row in read_sound_rows(path):
        key, prompt = row.value.get("key"), row.value.get("prompt")
        names = _list(row.value.get("instruction_id_list"), str)
        arguments = _list(row.value.get("kwargs"), dict)
        if not isinstance(key, int | str) or isinstance(key, bool):
            raise FPOError(f"{row.where}: 'key' has to be a number or text, this is {key!r}")
        if str(key) in rows:
            raise FPOError(f"{row.where}: key {key!r} is that of {rows[str(key)].where}, too")
        if not isinstance(prompt, str) or not prompt:
            raise FPOError(f"{row.where}: 'prompt' has to be text, this is {prompt!r}")
        if not names:
            raise FPOError(f"{row.where}: 'instruction_id_list' has to be a list of names")
        if len(arguments) != len(names):
            raise FPOError(f"{row.where}: 'kwargs' has to be one object for each instruction")
        rows[str(key)] = row
    return list(rows.values())


def _list(value: Any, kind: type) -> list[Any]:
    # A list of another kind is as good as none.
    good = isinstance(value, list) and all(isinstance(item, kind) for item in value)
    return value if good else []


def _check_instructions(checkers: ModuleType, row: Row) -> None:
    """Refuse instructions that the checkers would stumble over, or complete at random."""
    known = checkers.instructions_registry.INSTRUCTION_DICT
    for name, arguments in zip(row.value["instruction_id_list"], row.value["kwargs"], strict=True):
        if name not in known:
            raise FPOError(
                f"{row.where}: lm-eval has no instruction {name!r}; it has "
                f"{', '.join(sorted(known))}"
            )
        given = {key: value for key, value in arguments.items() if value}  # as lm-eval does
        instruction = known[name](name)
        try:
            with _same_draws():
                instruction.build_description(**given)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FPOError(f"{row.where}: kwargs of {name!r} do not serve ({error})") from error
        missing = set(instruction.get_instruction_args_keys()) - given.keys()
        if missing:
            raise FPOError(
                f"{row.where}: kwargs of {name!r} lack {', '.join(sorted(missing))}: lm-eval would "
                f"draw it at random"
            )


@contextmanager
def _same_draws() -> Iterator[None]:
    """Python's generator starts at the seed inside, and goes on as before afterwards."""
    state = random.getstate()
    random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(state)


def _verdicts(checkers: ModuleType, row: Row, response: str) -> list[dict[str, Any]]:
    with _same_draws():
        result = checkers.process_results(row.value, [response])
    return [
        {"question": str(row.value["key"]), "instruction": name, "strict": strict, "loose": loose}
        for name, strict, loose in zip(
            row.value["instruction_id_list"],
            result["inst_level_strict_acc"],
            result["inst_level_loose_acc"],
            strict=True,
        )
    ]


def _scores(verdicts: Sequence[dict[str, Any]], resamples: int, seed: int) -> Iterator[Score]:
    """All figures; each bootstrap draws prompts, with all of their instructions."""
    families = sorted({row["instruction"].partition(":")[0] for row in verdicts})
    for kind in ("strict", "loose"):
        met, asked = _by_prompt(verdicts, kind)
        yield _share(
            f"prompt_{kind}", f"Prompts followed, {kind}",
            (met == asked).astype(float), np.ones(len(met)), resamples, seed,
        )  # fmt: skip
    for kind in ("strict", "loose"):
        name, label = f"instruction_{kind}", f"Instructions followed, {kind}"
        yield _share(name, label, *_by_prompt(verdicts, kind), resamples, seed)
    for family in families:
        own = [row for row in verdicts if row["instruction"].partition(":")[0] == family]
        for kind in ("strict", "loose"):
            name, label = f"instruction_{kind}/{family}", f"{family}, {kind}"
            yield _share(name, label, *_by_prompt(own, kind), resamples, seed)


def _by_prompt(verdicts: Sequence[dict[str, Any]], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Instructions followed and asked for, of each prompt [P]."""
    counts: dict[str, list[int]] = {}
    for row in verdicts:
        met = counts.setdefault(row["question"], [0, 0])
        met[0] += row[kind]
        met[1] += 1
    both = np.array(list(counts.values()), dtype=np.float64)
    return both[:, 0], both[:, 1]


def _share(
    name: str, label: str, met: np.ndarray, asked: np.ndarray, resamples: int, seed: int
) -> Score:
    draws = np.random.default_rng(seed).integers(0, len(met), size=(resamples, len(met)))
    low, high = np.percentile(met[draws].sum(1) / asked[draws].sum(1), [2.5, 97.5])
    count = int(asked.sum())
    value = float(met.sum() / asked.sum())
    return Score(name, label, "share", value, float(low), float(high), count, count)
