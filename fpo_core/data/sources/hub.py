"""Splits of datasets on the Hugging Face hub: their files, at one commit.

A recipe names ``OWNER/NAME:SPLIT`` or ``OWNER/NAME:CONFIG:SPLIT``; ``OWNER/NAME@REVISION:...`` pins
a revision. The files are the repository's own where their names say the split, otherwise the hub's
conversion to Parquet. Nothing of a dataset is ever executed.
"""

import functools
import glob
import itertools
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fpo_core.data.sources.folders import folder_split
from fpo_core.data.sources.slices import split_slice
from fpo_core.data.sources.splits import FURTHER_KINDS, KINDS, split_files, splits_there
from fpo_core.errors import FPOError
from fpo_core.models.source import hub_did_not_answer

log = logging.getLogger("fpo.data")

_SOURCE = re.compile(
    r"(?P<name>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<config>[\w.-]+))?"
    r":(?P<split>[\w.-]+)"
)
MAIN, CONVERTED = "main", "refs/convert/parquet"
ANSWER_SECONDS = 5
REMEDY = "save the split as Parquet or JSONL and give the file"


class HubSplit(NamedTuple):
    """A split as a recipe names it."""

    source: str  # the name as it is written
    name: str  # OWNER/NAME
    revision: str | None
    config: str | None
    split: str

    @property
    def branches(self) -> tuple[str, ...]:
        """Return the branches that may have its files, first choice first."""
        return (self.revision,) if self.revision else (MAIN, CONVERTED)

    def error(self, told: str) -> FPOError:
        """Return an error that names the split."""
        return FPOError(f"data {self.source!r}: {told}")


class SplitFiles(NamedTuple):
    """A split's files at one commit."""

    asked: HubSplit
    branch: str  # that led to the commit
    commit: str
    config: str
    files: tuple[str, ...]  # paths in the repository

    @property
    def identity(self) -> str:
        """Return the identity of the content; a name that moves is no part of it."""
        return f"hub-data:{self.asked.name}@{self.commit}:{self.config}:{self.asked.split}"


def hub_split(source: str) -> HubSplit | None:
    """Return the split that a source names, without its slice; None when it is a local name."""
    name, _ = split_slice(source)
    match = _SOURCE.fullmatch(name)
    if not match or Path(name).exists() or folder_split(name)[0]:
        return None
    return HubSplit(name, match["name"], match["revision"], match["config"], match["split"])


def resolve_split(asked: HubSplit) -> SplitFiles | None:
    """Find the split's files at the commit that its name stands for now.

    Where the hub cannot be asked, at the commit that the hub's cache has the split of; None where
    that has not all of it.

    Raises:
        FPOError: the hub has no such dataset, revision or split, or does not let this user see it.
    """
    listing = functools.cache(lambda branch: _listing(asked, branch))
    there: list[str] = []
    try:
        for kinds in (KINDS, FURTHER_KINDS):
            for branch in asked.branches:
                commit, paths = listing(branch) or ("", [])
                found = _files(asked, paths, kinds)
                if found:
                    return SplitFiles(asked, branch, commit, *found)
                there = splits_there(paths) or there
    except _NotAnswered:
        return _cached_split(asked)
    if not there:
        raise asked.error(f"it has no Parquet, JSONL or JSON files to read; {REMEDY}")
    config = f" in the configuration {asked.config!r}" if asked.config else ""
    raise asked.error(f"there is no split {asked.split!r}{config}; there are: {', '.join(there)}")


def fetch_split(found: SplitFiles) -> list[Path]:
    """Return the split's files on this machine; fetch those that the hub's cache lacks.

    Raises:
        FPOError: they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    asked, patterns = found.asked, [glob.escape(file) for file in found.files]

    def fetch(revision: str) -> Path:
        return Path(
            snapshot_download(
                asked.name, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
        )

    if _cached_commit(found.asked.name, found.commit, found.files) is None:
        count = len(found.files)
        log.info("data %s: fetching %d file%s from the hub", asked.source, count, "s"[: count > 1])
    try:
        # By the branch's name: the hub's cache then knows offline which commit it stood for.
        folder = fetch(found.branch)
        if folder.name != found.commit:  # it has moved since
            folder = fetch(found.commit)
    except GatedRepoError as error:
        raise asked.error(_GATED) from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise asked.error(
            f"could not be fetched from the hub ({type(error).__name__}: {reason}). Check the "
            f"network, or {REMEDY}"
        ) from error
    return [folder / file for file in found.files]


_GATED = (
    "the dataset is gated. Accept its terms on its page at the hub, and set HF_TOKEN to a token of "
    "that account"
)


class _NotAnswered(Exception):
    """The hub cannot be asked."""


def _listing(asked: HubSplit, branch: str) -> tuple[str, list[str]] | None:
    """Ask the hub for a branch's commit and files; return None where the branch does not exist."""
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = dataset_info(asked.name, revision=branch, timeout=ANSWER_SECONDS)
    except GatedRepoError as error:
        raise asked.error(_GATED) from error
    except RepositoryNotFoundError as error:
        raise asked.error(
            f"the hub has no dataset {asked.name!r}, or none that you may read. Check the name; "
            f"for a private or gated one set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        if asked.revision is None:
            return None
        raise asked.error(f"the dataset has no revision {asked.revision!r}") from error
    except HFValidationError as error:
        raise asked.error(f"{asked.name!r} cannot be a dataset's name ({error})") from error
    except Exception as error:
        if not hub_did_not_answer(error):
            raise
        raise _NotAnswered from error
    assert info.sha is not None
    return info.sha, [file.rfilename for file in info.siblings or ()]


def _files(
    asked: HubSplit, paths: list[str], kinds: Sequence[str]
) -> tuple[str, tuple[str, ...]] | None:
    try:
        return split_files(paths, asked.split, asked.config, kinds)
    except FPOError as error:
        raise asked.error(str(error)) from error


def _cached_split(asked: HubSplit) -> SplitFiles | None:
    """Return the split from the hub's cache, None unless every file is in it."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError

    for kinds, branch in itertools.product((KINDS, FURTHER_KINDS), asked.branches):
        try:
            tree = get_cached_repo_tree(asked.name, repo_type="dataset", revision=branch)
        except (CachedRepoTreeNotFoundError, HFValidationError):
            continue
        found = _files(asked, [file.path for file in tree], kinds)
        if found is None:
            continue
        commit = _cached_commit(asked.name, branch, found[1])
        return SplitFiles(asked, branch, commit, *found) if commit else None
    return None


def _cached_commit(name: str, revision: str, files: tuple[str, ...]) -> str | None:
    """Return the commit of a revision in the hub's cache, None unless every file is in it."""
    from huggingface_hub import try_to_load_from_cache

    commit = None
    for file in files:
        cached = try_to_load_from_cache(name, file, revision=revision, repo_type="dataset")
        if not isinstance(cached, str):
            return None
        commit = Path(cached).parents[len(PurePosixPath(file).parts) - 1].name
    return commit
