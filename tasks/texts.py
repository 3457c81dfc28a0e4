"""How much text a recipe's data is, without tokenizing it: rows and mean tokens, and how known.

From the artifact of token ids where it is there; else from the files, at so many bytes a token;
else, for data sets on the hub, what is published of them. Cheap: of a big file only the first rows
are read.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from fpo_core.data.instructions import read_instructions
from fpo_core.data.pairs import PreferencePair, read_pairs
from fpo_core.data.sources.hub import hub_split
from fpo_core.recipe import Recipe
from storage.manifest import Manifest

SAMPLE_ROWS = 1000
BYTES_A_TOKEN = 4  # of English text, as tokenizers of 32,000 to 256,000 entries cut it


class Texts(NamedTuple):
    """Pairs or dialogues: how many, and their mean lengths in tokens."""

    rows: int
    prompt: float
    answers: float  # of a row together: both sides of a pair
    known_from: str

    @property
    def tokens(self) -> float:
        """Of all rows; the prompt counts once, as the passes run it."""
        return self.rows * (self.prompt + self.answers)

    @property
    def scored(self) -> float:
        """Of the answers of all rows."""
        return self.rows * self.answers


class _Published(NamedTuple):
    rows: dict[str, int]  # by split
    prompt: float
    answers: float
    known_from: str


# Numbers of rows are those of the data sets' cards.
PUBLISHED = {
    "HuggingFaceH4/ultrafeedback_binarized": _Published(
        {"train_prefs": 61_135, "test_prefs": 2_000}, 185.1, 2 * 305.3,
        "UltraFeedback's published means, 185.1 tokens a prompt and 305.3 an answer "
        "(arXiv 2310.01377, Table 1)",
    ),
    "HuggingFaceH4/ultrachat_200k": _Published(
        {"train_sft": 207_865}, 1467.4 * 6.6 / 7.6, 1467.4 / 7.6,
        "UltraChat's published means, 1467.4 tokens and 3.8 rounds a dialogue, of which the last "
        "answer is learnt (arXiv 2305.14233)",
    ),
}  # fmt: skip


def texts_of_artifact(manifest: Manifest) -> Texts:
    """What the manifest of ``pairs`` or ``instructions`` says."""
    stats = manifest["stats"]
    rows = sum(stats["pairs"].values())
    # Artifacts of before the answers were counted: all tokens, which is an upper bound.
    scored = stats.get("answer_tokens", stats["tokens"])
    prompt = (stats["tokens"] - scored) / rows
    name = f"{manifest['stage']}/{manifest['version']}"
    return Texts(rows, prompt, scored / rows, f"counted in {name}")


def pair_texts(recipe: Recipe, split: str) -> Texts | None:
    """The pairs of ``train`` or ``heldout``; None when nothing is known of them."""
    sources = recipe.data.train if split == "train" else recipe.data.heldout
    return _together(sources, read_pairs, recipe.data.limit)


def dialogue_texts(recipe: Recipe) -> Texts | None:
    """The warm start's dialogues."""
    settings = recipe.sft
    if settings is None:
        return None
    return _together(
        settings.data, lambda path: read_instructions(path, settings.turns), settings.limit
    )


def _together(
    sources: Sequence[str],
    read: Callable[[str], Iterator[PreferencePair]],
    limit: int | None,
) -> Texts | None:
    parts = [_of_hub(source) if hub_split(source) else _of_file(source, read) for source in sources]
    known = [part for part in parts if part is not None]
    rows = sum(part.rows for part in known)
    if len(known) < len(parts) or not rows:
        return None
    prompt = sum(part.rows * part.prompt for part in known) / rows
    answers = sum(part.rows * part.answers for part in known) / rows
    told = "; ".join(dict.fromkeys(part.known_from for part in known))
    return Texts(min(rows, limit or rows), prompt, answers, told)


def _of_hub(source: str) -> Texts | None:
    asked = hub_split(source)
    assert asked is not None
    published = PUBLISHED.get(asked.name)
    if published is None or asked.split not in published.rows:
        return None
    return Texts(
        published.rows[asked.split], published.prompt, published.answers, published.known_from
    )


def _of_file(source: str, read: Callable[[str], Iterator[PreferencePair]]) -> Texts | None:
    """From a file's first rows. A dialogue of several answers counts as one row."""
    sample = list(islice(read(source), SAMPLE_ROWS))
    if not sample:
        return None
    prompt = sum(len(turn["content"].encode()) for pair in sample for turn in pair.prompt)
    answers = sum(len((pair.chosen + (pair.rejected or "")).encode()) for pair in sample)
    rows = len(sample) if len(sample) < SAMPLE_ROWS else _count_rows(source, read)
    scale = BYTES_A_TOKEN * len(sample)
    return Texts(rows, prompt / scale, answers / scale,
                 f"the data files at {BYTES_A_TOKEN} bytes a token")  # fmt: skip


def _count_rows(source: str, read: Callable[[str], Iterator[PreferencePair]]) -> int:
    file = Path(source).expanduser()
    if file.suffix.lower() == ".parquet":
        return pq.read_metadata(file).num_rows
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        with file.open("rb") as lines:
            return sum(1 for line in lines if not line.isspace())
    return sum(1 for _ in read(source))
