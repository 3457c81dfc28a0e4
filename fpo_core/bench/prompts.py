"""The judge's prompts of a pack: Arena-Hard's ``judge_config.yaml``, MT-Bench's prompts.

Templates are the authors' own, filled in with ``str.format``; their placeholders are checked when
the pack is read, so that one that is missing or misspelt is told before a judge is asked.
"""

import string
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fpo_core.bench.contents import value_at
from fpo_core.data.sources import read_sound_rows
from fpo_core.errors import FPOError
from fpo_core.recipe.base import Count, NonNegative
from fpo_core.validation import explain

# The verdicts of Arena-Hard are read by this pattern; a pack may state it, not change it.
ARENA_LABELS = r"\[\[([AB<>=]+)\]\]"
_ARENA_PLACES = frozenset({"question_1", "answer_1", "answer_2"})
_SINGLE = {"question", "answer"}
_TWO_TURNS = {"question_1", "question_2", "answer_1", "answer_2"}
# Of MT-Bench: the placeholders of a single rating's prompts, by name.
_MT_BENCH_PLACES = {
    "single-v1": _SINGLE,
    "single-math-v1": {*_SINGLE, "ref_answer_1"},
    "single-v1-multi-turn": _TWO_TURNS,
    "single-math-v1-multi-turn": {*_TWO_TURNS, "ref_answer_1", "ref_answer_2"},
}


class ArenaJudge(BaseModel):
    """What ``judge_config.yaml`` says to the judge; its keys about models and files are skipped."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    system_prompt: str
    prompt_template: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
        Field(min_length=1),
    ]
    regex_pattern: str = ARENA_LABELS
    temperature: NonNegative = 0.0
    max_tokens: Count = 4096


class Prompt(NamedTuple):
    """A prompt of MT-Bench's judge."""

    system: str
    template: str


def read_arena_judge(file: Path) -> ArenaJudge:
    """Read a judge's configuration, YAML or JSON.

    Raises:
        FPOError: not YAML, a key missing or of the wrong type, a placeholder missing or unknown,
            another pattern of verdicts than Arena-Hard's.
    """
    values = read_yaml(file)
    try:
        judge = ArenaJudge.model_validate(values)
    except ValidationError as error:
        raise FPOError(f"{file}: {explain(error, ArenaJudge)}") from error
    used = set().union(*(_placeholders(one, file) for one in judge.prompt_template))
    _check_placeholders(used, _ARENA_PLACES, f"{file}: prompt_template")
    if judge.regex_pattern != ARENA_LABELS:
        raise FPOError(
            f"{file}: regex_pattern is {judge.regex_pattern!r}; Arena-Hard's verdicts are "
            f"[[A>>B]] to [[B>>A]], read by {ARENA_LABELS}. Leave the key out"
        )
    return judge


def read_mt_bench_prompts(file: Path) -> dict[str, Prompt]:
    """Read the four prompts of a single rating, by name.

    Raises:
        FPOError: one is missing or comes twice, or its placeholders are not the ones it needs.
    """
    prompts: dict[str, Prompt] = {}
    for row in read_sound_rows(file):
        name = value_at(row, str, "name")
        if name not in _MT_BENCH_PLACES:
            continue
        if name in prompts:
            raise FPOError(f"{row.where}: the prompt {name!r} comes twice; take out one")
        prompt = Prompt(value_at(row, str, "system_prompt"), value_at(row, str, "prompt_template"))
        where = f"{row.where}: prompt_template"
        _check_placeholders(_placeholders(prompt.template, where), _MT_BENCH_PLACES[name], where)
        prompts[name] = prompt
    missing = [name for name in _MT_BENCH_PLACES if name not in prompts]
    if missing:
        raise FPOError(f"{file}: no prompt named {', '.join(missing)}; FastChat's file has them")
    return prompts


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FPOError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise FPOError(f"{file}: holds {type(values).__name__}, not a mapping of keys")
    return values


def _placeholders(template: str, where: object) -> set[str]:
    """The names in braces, which are all that a template may use of ``str.format``."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise FPOError(
            f"{where}: not a template ({error}); a brace of the text is doubled: {{{{"
        ) from error
    names = {name for _, name, _, _ in parts if name is not None}
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise FPOError(f"{where}: a placeholder is a name in braces and nothing more")
    return names


def _check_placeholders(used: set[str], wanted: set[str] | frozenset[str], where: str) -> None:
    missing, unknown = sorted(wanted - used), sorted(used - wanted)
    if missing or unknown:
        faults = [f"lacks {{{name}}}" for name in missing]
        faults += [f"has {{{name}}}, which is unknown" for name in unknown]
        raise FPOError(f"{where}: {', '.join(faults)}")
