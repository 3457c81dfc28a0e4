"""The files of a local source: a file, a folder of files, a glob, or a saved `datasets` folder."""

import glob
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fpo_core.data.sources.kinds import BY_SUFFIX, data_suffix, kind_of
from fpo_core.data.sources.row import DataFile
from fpo_core.data.sources.splits import METADATA, files_named, names_said
from fpo_core.errors import FPOError

log = logging.getLogger("fpo.data")

# Files that lie next to data and hold none; others of unknown kinds are looked into.
_NO_DATA_SUFFIXES = {".bib", ".cff", ".crc", ".html", ".jpg", ".lock", ".log", ".md", ".pdf"}
_NO_DATA_SUFFIXES |= {".png", ".py", ".rst", ".sh", ".sha256", ".toml", ".yaml", ".yml"}
_NO_DATA_NAMES = ("readme", "license", "licence", "notice", "changelog")
_MAX_SHOWN = 5


class LocalFiles(NamedTuple):
    """The files of a local source, in the order they are read.

    Attributes:
        files: the files.
        keys: their names relative to the folder, which identify them.
        alone: whether the source names this one file.
    """

    files: tuple[DataFile, ...]
    keys: tuple[str, ...]
    alone: bool = False


def local_files(source: str) -> LocalFiles:
    """Find the files of a local source.

    Args:
        source: a file, a folder, FOLDER:SPLIT or a glob.

    Returns:
        At least one file.

    Raises:
        FPOError: nothing of this name exists, no file holds data, or a split has to be named.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return LocalFiles((DataFile(path, str(path), path.name),), (path.name,), alone=True)
    if path.is_dir():
        return _of_folder(path, source)
    folder, split = folder_split(source)
    if folder is not None:
        return _of_split(folder, split, source)
    if glob.has_magic(source):
        return _of_glob(str(path), source)
    raise FPOError(
        f"data file {source!r} does not exist; a relative path starts at the folder the "
        f"command runs in"
    )


def folder_split(source: str) -> tuple[Path | None, str]:
    """Split FOLDER:SPLIT into the folder that exists and the split; None for the folder if none."""
    name, mark, split = source.rpartition(":")
    folder = Path(name).expanduser()
    found = bool(mark and name and split) and "/" not in split and folder.is_dir()
    return (folder if found else None), split


def _of_folder(folder: Path, source: str) -> LocalFiles:
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(_saved_splits(folder))
        raise FPOError(
            f"data {source!r} is a saved DatasetDict with the splits {splits}. Name one, as "
            f"{source.rstrip('/')}:SPLIT"
        )
    files = list(_walk(folder, {folder.resolve()}))
    keys = [file.relative_to(folder).as_posix() for file in files]
    if not files:
        raise FPOError(
            f"data folder {source!r} has no data files (JSON, JSONL, CSV, TSV, Parquet or Arrow)"
        )
    splits = names_said(keys)
    if len(splits) > 1:
        raise FPOError(
            f"data folder {source!r} has files of several splits: {', '.join(splits)}. Name one, "
            f"as {source.rstrip('/')}:{splits[-1]}, or give a glob to read several as one"
        )
    return _named(folder, files, keys)


def _of_split(folder: Path, split: str, source: str) -> LocalFiles:
    if (folder / "dataset_dict.json").is_file():
        splits = _saved_splits(folder)
        if split not in splits:
            raise FPOError(f"data {source!r}: the splits there are {', '.join(splits)}")
        files = _saved_files(folder / split)
        return _named(folder, files, [file.relative_to(folder).as_posix() for file in files])
    files = {file.relative_to(folder).as_posix(): file for file in _walk(folder, set())}
    keys = files_named(list(files), split)
    if not keys:
        splits = ", ".join(names_said(list(files), known_only=False)) or "none"
        raise FPOError(f"data {source!r}: the folder's files name no such split; found: {splits}")
    return _named(folder, [files[key] for key in keys], keys)


def _of_glob(pattern: str, source: str) -> LocalFiles:
    found = sorted(map(Path, glob.glob(pattern, recursive=True)))
    files = [file for file in found if file.is_file() and _holds_data(file) and not _loops(file)]
    if not files:
        hint = " (a slice cannot follow a glob)" if source.endswith("]") else ""
        raise FPOError(
            f"data {source!r} matches no data file{hint}; a relative pattern starts at the folder "
            f"the command runs in"
        )
    fixed = list(Path(pattern).parts)
    while fixed and any(glob.has_magic(part) for part in fixed):
        fixed.pop()
    keys = [file.relative_to(Path(*fixed)).as_posix() for file in files]
    return LocalFiles(tuple(DataFile(file, str(file), file.name) for file in files), tuple(keys))


def _named(folder: Path, files: Sequence[Path], keys: Sequence[str]) -> LocalFiles:
    named = (
        DataFile(file, f"{folder}/{key}", file.name) for file, key in zip(files, keys, strict=True)
    )
    return LocalFiles(tuple(named), tuple(keys))


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Yield a folder's data files, those of its folders at their place in the order of names."""
    if (folder / "state.json").is_file():
        yield from _saved_files(folder)
        return
    try:
        paths = sorted(folder.iterdir(), key=lambda one: one.name)
    except OSError as error:
        raise FPOError(f"data folder {str(folder)!r} cannot be read ({error.strerror})") from error
    for path in paths:
        if path.name.startswith((".", "_")):
            continue
        if path.is_dir():
            target = path.resolve()
            if target not in seen:  # a link that leads back would never end
                yield from _walk(path, seen | {target})
        elif _holds_data(path):
            yield path


def _holds_data(file: Path) -> bool:
    if file.name in METADATA or file.name.lower().startswith(_NO_DATA_NAMES):
        return False
    suffix = data_suffix(file.name)
    if suffix in BY_SUFFIX:
        return True
    if suffix in _NO_DATA_SUFFIXES:
        return False
    try:
        kind_of(DataFile(file, file.name, file.name))
    except FPOError:
        log.warning("data: %s is skipped, it is of no kind of data file", file)
        return False
    return True


def _loops(file: Path) -> bool:
    """Return whether a path goes through one folder twice, by a link that leads back."""
    folders = [folder.resolve() for folder in file.parents]
    return len({*folders}) < len(folders)


def _saved_splits(folder: Path) -> list[str]:
    value = _read_json(folder / "dataset_dict.json")
    splits = value.get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise FPOError(f"{folder / 'dataset_dict.json'}: no list of splits. Save the data again")
    return splits


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of a saved Dataset in the order of its rows."""
    state = _read_json(folder / "state.json")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise FPOError(
            f"data folder {str(folder)!r}: the saved dataset selects and orders rows by an indices "
            f"file. Save it again after dataset = dataset.flatten_indices()"
        )
    names = [one.get("filename") for one in state.get("_data_files") or () if isinstance(one, dict)]
    files = [folder / name for name in names if isinstance(name, str) and _is_plain(name)]
    missing = [file.name for file in files if not file.is_file()]
    if not files or len(files) < len(names) or missing:
        told = f"{', '.join(missing[:_MAX_SHOWN])} missing" if missing else "it names no data files"
        raise FPOError(
            f"data folder {str(folder)!r}: incomplete according to state.json ({told}). Save or "
            f"copy the dataset again"
        )
    return files


def _is_plain(name: str) -> bool:
    return PurePosixPath(name).name == name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FPOError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise FPOError(f"{file}: holds {type(value).__name__}, expected an object")
    return value
