"""Splits of a dataset repository or folder, told from the names of the files.

``train.jsonl``, ``data/train-00000-of-00003.parquet``, ``CONFIG/train-00000-of-00001.parquet`` and
``CONFIG/train/0000.parquet`` (the hub's own conversion) all say configuration and split. A name
says one split or none: no file is ever read for two.
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from fpo_core.data.sources.compression import SUFFIXES as COMPRESSED
from fpo_core.data.sources.kinds import BY_SUFFIX
from fpo_core.errors import FPOError

DEFAULT = "default"  # the configuration of files that name none
# Best first: where a split is there in two kinds, it is read from one.
KINDS = (".parquet", ".jsonl", ".ndjson", ".json")
# Asked for only where there is none of the above, so that what is read of a repository stays.
FURTHER_KINDS = tuple(
    kind + compressed
    for compressed in ("", *COMPRESSED)
    for kind in dict.fromkeys((*KINDS, *BY_SUFFIX))
    if compressed or kind not in KINDS
)
# What follows a split's name in that of a shard: "-00000-of-00003", "-00000-of-00003-0a1b2c3d".
_NUMBER = re.compile(r"-\d+(-of-\d+)?(-[0-9a-f]+)?$")
# Names that tell a file from its neighbours, and nothing else: the folder says the split.
_PART = re.compile(r"(part|shard|chunk|file|data)?[-_.]?\d*")
# Names of splits that nobody reads as one.
_KNOWN_SPLIT = re.compile(r"(train|test|val|valid|validation|dev|eval|heldout)([_-].*)?")
# What the `datasets` library writes next to the data.
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


class SplitPlace(NamedTuple):
    """Configuration, split and kind that a file's name tells."""

    config: str
    split: str
    kind: str  # its suffix


def place_of(path: str) -> SplitPlace | None:
    """Read a file's configuration and split off its name; return None for other than data files."""
    file = PurePosixPath(path)
    kind = "".join(file.suffixes[-2:] if file.suffix.lower() in COMPRESSED else file.suffixes[-1:])
    if kind.lower() not in (*KINDS, *FURTHER_KINDS) or file.name in METADATA:
        return None
    folders = list(file.parts[:-1])
    split = _NUMBER.sub("", file.name.removesuffix(kind))
    if folders and _PART.fullmatch(split):
        split = folders.pop()
    config = "/".join(folder for folder in folders if folder != "data")
    return SplitPlace(config or DEFAULT, split, kind.lower())


def split_files(
    paths: Sequence[str], split: str, config: str | None, kinds: Sequence[str] = KINDS
) -> tuple[str, tuple[str, ...]] | None:
    """Find the configuration and the files of a split, in order; return None if it has no file.

    Args:
        paths: the repository's files.
        split: the split's name.
        config: the configuration's; None takes the only one, or the default one.
        kinds: suffixes to look for, best first.

    Raises:
        FPOError: no configuration is given, and several have the split.
    """
    placed = [(path, place) for path in sorted(paths) if (place := place_of(path))]
    for kind in kinds:
        found: dict[str, list[str]] = {}
        for path, place in placed:
            if (place.kind, place.split) == (kind, split) and config in (None, place.config):
                found.setdefault(place.config, []).append(path)
        if not found:
            continue
        if len(found) > 1 and DEFAULT not in found:
            raise FPOError(
                f"several configurations have a split {split!r}: {', '.join(found)}; name one, "
                f"as OWNER/NAME:CONFIG:{split}"
            )
        chosen = DEFAULT if len(found) > 1 else next(iter(found))
        return chosen, tuple(found[chosen])
    return None


def splits_there(paths: Sequence[str]) -> list[str]:
    """Return the splits that a repository's files name, as a recipe writes them."""
    places = [place for path in paths if (place := place_of(path))]
    first = min((KINDS.index(place.kind) for place in places if place.kind in KINDS), default=None)
    return sorted(
        {
            place.split if place.config == DEFAULT else f"{place.config}:{place.split}"
            for place in places
            if first is None or place.kind == KINDS[first]
        }
    )


def files_named(paths: Sequence[str], split: str) -> list[str]:
    """Return the files of a folder whose names say a split, of whatever kind, in order."""
    return [path for path in paths if (place := place_of(path)) and place.split == split]


def names_said(paths: Sequence[str], *, known_only: bool = True) -> list[str]:
    """Return the splits that a folder's files name.

    Args:
        paths: the files.
        known_only: leave out names such as "part" that may be no split's.
    """
    names = {place.split for path in paths if (place := place_of(path))}
    return sorted(name for name in names if not known_only or _KNOWN_SPLIT.fullmatch(name))
