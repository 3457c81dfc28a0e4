"""The fault matrix as a table: ``python -m benchmarks.faults [--write docs/reliability.md]``."""

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.chance import FAULTS
from benchmarks.faults.matrix import Row, run_matrix

START, END = "<!-- fault matrix -->", "<!-- end of the fault matrix -->"
KILLED = "the process that writes is killed (SIGKILL) at random moments"
OTHERS = {
    "all of them mixed": "each of the above, at random",
    "object store killed and restarted": "SIGKILL to the server, a second's pause, started again",
    "writer killed (SIGKILL)": KILLED,
    "two runs at once": "both make the same artifact, and both have to succeed",
    "disk full": "a file system of 32 MB that something else fills",
}


def main() -> None:
    """Run it, print the table, and put it into a page where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--probability", type=float, default=0.15, help="of a fault for a request")
    parser.add_argument("--kills", type=int, default=50, help="of the writer, on each place")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run_matrix(
            Path(folder), probability=options.probability, kills=options.kills, seed=options.seed,
            on_row=lambda row: print(_line(row), file=sys.stderr, flush=True),
        )  # fmt: skip
    table = _table(rows, options)
    print(table)
    if options.write:
        page = options.write.read_text()
        before, _, rest = page.partition(START)
        options.write.write_text(f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}")
    sys.exit(0 if all(row.ok for row in rows) else 1)


def _table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    head = "| where | fault | injected | runs until one ended well | torn | bytes | left over |"
    command = (
        f"python -m benchmarks.faults --probability {options.probability:g} "
        f"--kills {options.kills} --seed {options.seed}"
    )
    return "\n".join(
        [
            f"Made by `{command}` on {platform.system()} {platform.machine()}, "
            f"{sum(row.seconds for row in rows):.0f} s in all.",
            "",
            head,
            "|---" * 7 + "|",
            *(_line(row) for row in rows),
        ]
    )


def _line(row: Row) -> str:
    what = {**FAULTS, **OTHERS}[row.fault]
    bytes_ = "identical" if row.identical else "**different**"
    left = ", ".join(row.left_over) or "nothing"
    return (
        f"| {row.place} | **{row.fault.replace('_', ' ')}**: {what} | {row.injected} | {row.runs} "
        f"| {row.torn or 'none'} | {bytes_} | {left} |"
    )


if __name__ == "__main__":
    main()
