"""Where preference data and text come from, and what identifies them."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from fpo_core.data.sources.addresses import RemoteFiles, is_remote
from fpo_core.data.sources.folders import local_files
from fpo_core.data.sources.hub import SplitFiles, hub_split, resolve_split
from fpo_core.data.sources.slices import split_slice
from fpo_core.errors import FPOError
from fpo_core.models.source import file_digest

Resolved = SplitFiles | RemoteFiles  # the files that a name stood for when it was resolved

_WITHOUT_SPLIT = re.compile(r"\w[\w.-]*/[\w-]+(@[\w./-]+)?")


class DataIdentity(NamedTuple):
    """What a data source resolves to.

    Attributes:
        value: content identity, as it enters artifact versions.
        resolved: False when the hub could not be asked, so that ``value`` is only a name.
        files: the files of a hub split or of a remote address; None for local files.
    """

    value: str
    resolved: bool = True
    files: Resolved | None = None


def identify_data(source: str) -> DataIdentity:
    """Return the identity of a data source: digests of its files, or commit and split on the hub.

    A slice is part of it. Files of an s3:// or https:// address are fetched, since only their
    content identifies them.

    Args:
        source: the source as a recipe names it.

    Raises:
        FPOError: the source does not exist, cannot be fetched, or has no such split.
    """
    base, part = split_slice(source)
    mark = "" if part is None else str(part)
    asked = hub_split(base)
    if asked:
        found = resolve_split(asked)
        if found is None:
            return DataIdentity(f"hub-data:{source}", resolved=False)
        return DataIdentity(found.identity + mark, files=found)
    if is_remote(base):
        from fpo_core.data.sources.remote import fetch  # its HTTP client is slow to import

        remote = fetch(base)
        return DataIdentity(_value(remote.keys, remote.digests, remote.alone) + mark, files=remote)
    try:
        local = local_files(base)
    except FPOError as error:
        if _WITHOUT_SPLIT.fullmatch(base) and "does not exist" in str(error):
            raise FPOError(f"{error}, a dataset of the hub is OWNER/NAME:SPLIT") from error
        raise
    digests = [file_digest(file.path) for file in local.files]
    return DataIdentity(_value(local.keys, digests, local.alone) + mark)


def _value(keys: Sequence[str], digests: Sequence[str], alone: bool) -> str:
    """Return the identity of files: names count only where there may be several."""
    if alone:
        return f"file:{digests[0]}"
    named = [[key, digest] for key, digest in zip(keys, digests, strict=True)]
    return f"files:{hashlib.sha256(json.dumps(named).encode()).hexdigest()}"
