"""Resolves and reads data sources in a process with an HF_ENDPOINT of its own; prints JSON."""

import json
import sys

from fpo_core.data.pairs import read_pairs
from fpo_core.data.sources.identity import identify_data
from fpo_core.errors import FPOError
from fpo_core.quiet import set_quiet_defaults


def read(source: str) -> dict:
    """What becomes of a source: identity and pairs, or the error's text."""
    try:
        found = identify_data(source)
        told = {"identity": found.value, "resolved": found.resolved}
        if found.resolved:
            told["pairs"] = [(pair.chosen, pair.where) for pair in read_pairs(source, found.files)]
    except FPOError as error:
        return {"error": str(error)}
    return told


if __name__ == "__main__":
    set_quiet_defaults()
    sys.stdout.write(json.dumps([read(source) for source in sys.argv[1:]]))
