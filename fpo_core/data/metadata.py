"""Types of the metadata columns that stay with pairs, found in a first pass over the rows."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fpo_core.data.conversations.reader import metadata_value
from fpo_core.data.mixture import SplitSource
from fpo_core.data.sources.identity import Resolved
from fpo_core.data.sources.rows import read_rows
from fpo_core.errors import FPOError
from fpo_core.recipe.data import metadata_column

Kind = Literal["string", "int64", "float64", "bool"]
_INT64 = range(-(2**63), 2**63)


class MetadataColumns(NamedTuple):
    """The columns that `pairs` gets, by the name in the data."""

    kinds: dict[str, Kind]

    @property
    def stored(self) -> dict[str, Kind]:
        """Return the kinds by the names the columns have in `pairs`."""
        return {metadata_column(name): kind for name, kind in self.kinds.items()}

    def row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a row's values as the columns hold them."""
        return {
            metadata_column(name): _as_kind(values.get(name), kind)
            for name, kind in self.kinds.items()
        }


def metadata_columns(
    splits: Mapping[str, Sequence[SplitSource]], resolved: Mapping[str, Resolved]
) -> MetadataColumns:
    """Find the type of each metadata column that the recipe lists.

    Numbers stay numbers where every row has one; mixed and nested values become JSON text.

    Raises:
        FPOError: no row has a column that is listed.
    """
    sources = [each for given in splits.values() for each in given]
    names = list(sources[0].reading.metadata) if sources else []
    if not names:
        return MetadataColumns({})
    kinds: dict[str, set[Kind]] = {name: set() for name in names}
    seen: dict[str, None] = {}
    for path in dict.fromkeys(each.source.path for each in sources):
        for row in read_rows(path, resolved.get(path)):
            seen.update(dict.fromkeys(row.value))
            for name in names:
                value = metadata_value(row.value, name)
                if value is not None:
                    kinds[name].add(_kind_of(value))
    missing = [name for name in names if not kinds[name]]
    if missing:
        raise FPOError(
            f"data.metadata: no row has {', '.join(map(repr, missing))}. The rows have "
            f"{', '.join(map(repr, seen))}"
        )
    return MetadataColumns({name: _common(found) for name, found in kinds.items()})


def _kind_of(value: Any) -> Kind:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if value in _INT64 else "string"
    return "float64" if isinstance(value, float) else "string"


def _common(kinds: set[Kind]) -> Kind:
    if len(kinds) == 1:
        return next(iter(kinds))
    return "float64" if kinds == {"int64", "float64"} else "string"


def _as_kind(value: Any, kind: Kind) -> Any:
    if value is None:
        return None
    if kind == "float64":
        return float(value)
    if kind == "string" and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value
