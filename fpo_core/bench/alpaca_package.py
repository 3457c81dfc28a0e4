"""What is taken from the installed package ``alpaca-eval``: the judge's prompt and its metrics.

The prompt and its settings are read as files, with no import. Importing the package takes seconds,
reads a ``.env`` file into the environment and makes the root logger talk: ``alpaca_metrics`` does
it late and without these.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import os
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import yaml

from fpo_core.errors import FPOError

EVALUATOR = "weighted_alpaca_eval_gpt4_turbo"  # the leaderboard's
_MESSAGE = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", re.DOTALL)
_PLACE = re.compile(r"\{(instruction|output_1|output_2)\}")


class Evaluator(NamedTuple):
    """How a judge is asked, and which tokens its answer is read from."""

    messages: tuple[tuple[str, str], ...]  # (role, text with places to fill in)
    first: str  # the token for "the first output is better"
    labels: tuple[str, ...]  # all tokens that count
    max_tokens: int
    temperature: float
    top_logprobs: int
    digest: str  # sha256 over all of this

    def fill(self, instruction: str, first: str, second: str) -> tuple[tuple[str, str], ...]:
        """The messages for two outputs.

        The places are filled at once and after the messages were told apart, so that nothing in an
        output is taken for a place or for the end of a message. For texts without such marks the
        result is the package's.
        """
        texts = {"instruction": instruction, "output_1": first, "output_2": second}
        return tuple(
            (role, _PLACE.sub(lambda place: texts[place[1]], text)) for role, text in self.messages
        )


@functools.cache
def read_evaluator() -> Evaluator:
    """The evaluator of the leaderboard, without the model that it names.

    Raises:
        FPOError: package missing, or of a release whose evaluator has other rules than these.
    """
    folder = _package() / "evaluators_configs"
    try:
        config = yaml.safe_load((folder / EVALUATOR / "configs.yaml").read_text("utf-8"))[EVALUATOR]
        template = (folder / config["prompt_template"]).read_text("utf-8")
        asked, read = config["completions_kwargs"], config["completion_parser_kwargs"]
        known = (
            config["fn_completion_parser"] == "logprob_parser"
            and not read["is_binarize"]
            and config["batch_size"] == 1
        )
        evaluator = Evaluator(
            tuple((role, text.strip()) for role, text in _MESSAGE.findall(template)),
            read["numerator_token"],
            tuple(read["denominator_tokens"]),
            asked["max_tokens"],
            float(asked["temperature"]),
            asked["top_logprobs"],
            "",
        )
    except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
        raise _other_release(folder) from error
    places = _PLACE.findall("".join(text for _, text in evaluator.messages))
    if not known or sorted(places) != ["instruction", "output_1", "output_2"]:
        raise _other_release(folder)
    content = json.dumps(evaluator[:-1], ensure_ascii=False)
    return evaluator._replace(digest=hashlib.sha256(content.encode()).hexdigest())


@functools.cache
def alpaca_metrics() -> tuple[ModuleType, ModuleType]:
    """The package's modules ``metrics.winrate`` and ``metrics.glm_winrate``."""
    _package()
    level, before = logging.getLogger().level, os.environ.get("PYTHON_DOTENV_DISABLED")
    os.environ["PYTHON_DOTENV_DISABLED"] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources
            winrate = importlib.import_module("alpaca_eval.metrics.winrate")
            glm = importlib.import_module("alpaca_eval.metrics.glm_winrate")
    finally:
        logging.getLogger().setLevel(level)
        if before is None:
            del os.environ["PYTHON_DOTENV_DISABLED"]
        else:
            os.environ["PYTHON_DOTENV_DISABLED"] = before
    return winrate, glm


def _package() -> Path:
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or not spec.submodule_search_locations:
        raise FPOError(
            "AlpacaEval needs the package alpaca-eval, which is not installed: run "
            "`pip install 'fpo-pipeline[eval]'` in this environment"
        )
    return Path(spec.submodule_search_locations[0])


def _other_release(folder: Path) -> FPOError:
    return FPOError(
        f"the evaluator {EVALUATOR} in {folder} has another form than that of alpaca-eval 0.6.6: "
        f"run `pip install 'fpo-pipeline[eval]'` in this environment"
    )
