"""Where preference data and text come from, and what identifies them."""

import re
from pathlib import Path
from typing import NamedTuple

from fpo_core.data.sources.hub import SplitFiles, hub_split, resolve_split
from fpo_core.errors import FPOError
from fpo_core.models.source import file_digest

Resolved = SplitFiles  # the files that a name stood for when it was resolved

_WITHOUT_SPLIT = re.compile(r"\w[\w.-]*/[\w-]+(@[\w./-]+)?")


class DataIdentity(NamedTuple):
    """What a data source resolves to.

    Attributes:
        value: content identity, as it enters artifact versions.
        resolved: False when the hub could not be asked, so that ``value`` is only a name.
        files: the files of a split on the hub.
    """

    value: str
    resolved: bool = True
    files: Resolved | None = None


def identify_data(source: str) -> DataIdentity:
    """Content identity of a data source: the file's digest, or commit and split on the hub.

    Raises:
        FPOError: the file does not exist, or the hub has no such split.
    """
    asked = hub_split(source)
    if asked:
        found = resolve_split(asked)
        if found is None:
            return DataIdentity(f"hub-data:{source}", resolved=False)
        return DataIdentity(found.identity, files=found)
    path = Path(source).expanduser()
    if not path.is_file():
        hub = _WITHOUT_SPLIT.fullmatch(source)
        raise FPOError(
            f"data file {source!r} does not exist; a relative path starts at the folder the "
            f"command runs in" + (", a dataset of the hub is OWNER/NAME:SPLIT" if hub else "")
        )
    return DataIdentity(f"file:{file_digest(path)}")
