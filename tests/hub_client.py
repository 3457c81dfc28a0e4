"""Resolves and reads data sources in a process with an HF_ENDPOINT of its own; prints JSON."""

import json
import sys
from typing import Any

from fpo_core.data.sources import count_rows, identify_data, read_rows
from fpo_core.errors import FPOError
from fpo_core.quiet import set_quiet_defaults


def read(source: str) -> dict[str, Any]:
    """Return a source's identity, count and chosen answers with their places, or the error."""
    try:
        found = identify_data(source)
        told: dict[str, Any] = {"identity": found.value, "resolved": found.resolved}
        if found.resolved:
            rows = list(read_rows(source, found.files))
            told["pairs"] = [(_answer(row.value["chosen"]), row.where) for row in rows]
            assert count_rows(source, found.files) == len(rows)
    except FPOError as error:
        return {"error": str(error)}
    return told


def _answer(side: Any) -> str:
    return side if isinstance(side, str) else side[-1]["content"]


if __name__ == "__main__":
    set_quiet_defaults()
    sys.stdout.write(json.dumps([read(source) for source in sys.argv[1:]]))
