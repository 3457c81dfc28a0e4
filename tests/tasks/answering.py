"""A process that answers questions into a store, for tests that kill it."""

import sys
from collections.abc import Mapping
from pathlib import Path

from fpo_core.bench.model import Question
from fpo_core.recipe.generation import GenerationSettings
from fpo_core.recipe.schema import ModelSettings, ResourceSettings
from storage.artifact import Artifact
from storage.location import open_store
from storage.manifest import Made
from tasks.generate import AnswerSource, model_source, write_answers

VERSION = "0123456789abcdef"
SETTINGS = GenerationSettings(
    temperatures=(0.0, 0.8), samples=2, max_new_tokens=16, shard_questions=2, top_p=0.95
)
QUESTIONS = [
    Question(f"q{n}", (f"What is number {n}?", "And the fox?")[: 1 + n % 2]) for n in range(9)
]


def source(folder: Path) -> AnswerSource:
    """The tiny model."""
    model = ModelSettings(source=str(folder))
    return model_source(folder, "model", SETTINGS, model, ResourceSettings(threads=1))


def answer(
    store: Path,
    source: AnswerSource,
    settings: GenerationSettings = SETTINGS,
    own: Mapping[str, float] | None = None,
) -> Artifact:
    """Bring about the artifact, going on where an earlier attempt was."""
    opened = open_store(store)
    with opened.hold("answers", VERSION, None) as hold:
        assert hold is not None
        writer = opened.writer("answers", VERSION, hold)
        work = write_answers(writer, QUESTIONS, settings, source, own)
        return writer.commit(Made(1, {}, {}, work.stats, 1.0, {}))


if __name__ == "__main__":
    answer(Path(sys.argv[1]), source(Path(sys.argv[2])))
