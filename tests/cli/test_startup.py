"""Commands that only look load nothing heavy: seconds at the prompt."""

import subprocess
import sys

import pytest

HEAVY = ("prefect", "torch", "transformers", "scipy", "altair", "datasets", "boto3")
LOADED = """
import sys
from cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as left:
    assert not left.code
print("loaded:", *(name for name in {heavy} if name in sys.modules))
"""


@pytest.mark.parametrize("command", [("plan", "quickstart"), ("store", "ls"), ("--help",)])
def test_a_command_that_only_looks_loads_nothing_heavy(tmp_path, command):
    store = () if command == ("--help",) else ("--store", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(heavy=HEAVY), *command, *store],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "loaded:"
