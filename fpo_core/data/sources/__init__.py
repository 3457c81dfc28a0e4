"""Sources of rows: files, folders, globs, hub splits and remote files, and their identity."""

from fpo_core.data.sources.identity import DataIdentity, Resolved, identify_data
from fpo_core.data.sources.row import Row, RowFault
from fpo_core.data.sources.rows import count_rows, read_rows, read_sound_rows

__all__ = [
    "DataIdentity",
    "Resolved",
    "Row",
    "RowFault",
    "count_rows",
    "identify_data",
    "read_rows",
    "read_sound_rows",
]
