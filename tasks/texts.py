"""How much text a recipe's data is, without tokenizing it: rows and mean tokens, and how known.

From the artifact of token ids where it is there; else from the files, at so many bytes a token;
else, for data sets on the hub, what is published of them. Cheap: of a big file only the first rows
are read.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fpo_core.data.conversations.model import Turn
from fpo_core.data.mixture import (
    HELDOUT,
    TRAIN,
    SplitSource,
    dialogue_sources,
    first_conversations,
    pair_sources,
)
from fpo_core.data.sources.hub import hub_split
from fpo_core.data.sources.rows import count_rows
from fpo_core.data.sources.slices import split_slice
from fpo_core.recipe import Recipe
from fpo_core.recipe.data import HeldoutShare, SourceSettings
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
    """Return the size of the pairs of ``train`` or ``heldout``; None when nothing is known."""
    data = recipe.data
    texts = _together(pair_sources(data)[split], data.limit)
    if texts is None or not isinstance(data.heldout, HeldoutShare):
        return texts
    share = data.heldout.fraction
    return texts._replace(rows=round(texts.rows * (share if split == HELDOUT else 1 - share)))


def dialogue_texts(recipe: Recipe) -> Texts | None:
    """Return the size of the warm start's dialogues."""
    settings = recipe.sft
    if settings is None:
        return None
    return _together(dialogue_sources(settings)[TRAIN], settings.limit)


def _together(sources: Sequence[SplitSource], limit: int | None) -> Texts | None:
    parts = [_of_source(each) for each in sources]
    known = [part for part in parts if part is not None]
    rows = sum(part.rows for part in known)
    if len(known) < len(parts) or not rows:
        return None
    prompt = sum(part.rows * part.prompt for part in known) / rows
    answers = sum(part.rows * part.answers for part in known) / rows
    told = "; ".join(dict.fromkeys(part.known_from for part in known))
    return Texts(min(rows, limit or rows), prompt, answers, told)


def _of_source(each: SplitSource) -> Texts | None:
    source = each.source
    found = _of_hub(source.path) if hub_split(source.path) else _of_files(each)
    if found is None:
        return None
    rows = round(found.rows * source.weight)
    return found._replace(rows=min(rows, source.limit or rows))


def _of_hub(source: str) -> Texts | None:
    base, part = split_slice(source)
    asked = hub_split(base)
    assert asked is not None
    published = PUBLISHED.get(asked.name)
    if published is None or asked.split not in published.rows:
        return None
    rows = published.rows[asked.split]
    rows = rows if part is None else len(part.bounds(rows))
    return Texts(rows, published.prompt, published.answers, published.known_from)


def _of_files(each: SplitSource) -> Texts | None:
    """Estimate from a source's first rows. A dialogue of several answers counts as one row."""
    whole = each._replace(heldout=None, source=SourceSettings(path=each.source.path))
    sample = first_conversations([whole], {}, SAMPLE_ROWS)
    if not sample:
        return None
    prompt = sum(_num_bytes(item.prompt) for item in sample)
    answers = sum(_num_bytes(side) for item in sample for side in item.sides)
    rows = len(sample) if len(sample) < SAMPLE_ROWS else count_rows(each.source.path)
    scale = BYTES_A_TOKEN * len(sample)
    known_from = f"the data files at {BYTES_A_TOKEN} bytes a token"
    return Texts(rows, prompt / scale, answers / scale, known_from)


def _num_bytes(turns: Sequence[Turn]) -> int:
    return sum(len(turn.content.encode(errors="replace")) for turn in turns)
