"""Whether judging keeps its configured number of requests in flight.

    python -m benchmarks.judging [--rounds 3] [--answers 12] [--seconds 4]

Asks a scripted judge on loopback, in a process of its own, that takes its time over every answer:
so many seconds; in an uneven run five times as many over every tenth. Every answer goes into a
store in a folder, as in a run. Prints a Markdown table by concurrency, all of it as the server saw
it: the most requests in flight at once; their mean number from the first request's arrival to the
last's, as a share of the concurrency; and the throughput as a share of concurrency over the
answers' mean time. That one counts the end of a run, too, where places stay empty while the last
answers come.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from fpo_core.bench.model import JudgeRequest
from fpo_core.judge import Judge
from fpo_core.recipe.judge import JudgeSettings
from storage.judgments import Judgments
from storage.location import open_store
from tests.judge_server import Asked, JudgeServer, judging, say, slowly

SLOW, EVERY = 5, 10  # in an uneven run every tenth answer takes five times as long
CONCURRENCY = (8, 32, 64)


class Seen(NamedTuple):
    """What the server saw of one run."""

    most: int
    mean: float  # in flight while there was something left to ask
    seconds: float  # from the first arrival to the last answer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answers", type=int, default=12, help="for each place in flight")
    parser.add_argument("--seconds", type=float, default=4.0, help="that an answer takes")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve()
        return
    print("| answers | concurrency | most in flight | mean in flight, share | throughput, share |")
    print("|---|---|---|---|---|")
    for kind in ("even", "uneven"):
        for concurrency in CONCURRENCY:
            texts = _questions(kind, concurrency * options.answers, options.seconds)
            rounds = [_measure(texts, concurrency) for _ in range(options.rounds)]
            best = sum(map(_seconds, texts)) / concurrency
            most = max(seen.most for seen in rounds)
            means = [seen.mean / concurrency for seen in rounds]
            shares = [best / seen.seconds for seen in rounds]
            print(f"| {kind} | {concurrency} | {most} | {_of(means)} | {_of(shares)} |", flush=True)


def _of(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def _questions(kind: str, count: int, seconds: float) -> list[str]:
    slow = [kind == "uneven" and number % EVERY == 0 for number in range(count)]
    return [f"{seconds * (SLOW if late else 1)} s for {n}" for n, late in enumerate(slow)]


def _seconds(text: str) -> float:
    """How long the judge takes over a question."""
    return float(text.split()[0])


def _serve() -> None:
    """Judge until the standard input ends; print the address first, what was seen last."""

    def script(asked: Asked):
        return slowly(_seconds(asked.text), say("[[A>B]]"))

    with judging(script) as server:
        print(server.url, flush=True)
        sys.stdin.read()
        print(json.dumps(_seen(server)), flush=True)


def _seen(server: JudgeServer) -> Seen:
    steps = list(itertools.pairwise(server.history))
    last_arrival = max(later[0] for earlier, later in steps if later[1] > earlier[1])
    began, ended = server.history[0][0], server.history[-1][0]
    area = sum(
        earlier[1] * (later[0] - earlier[0]) for earlier, later in steps if later[0] <= last_arrival
    )
    return Seen(server.most_in_flight, area / (last_arrival - began), ended - began)


def _measure(texts: list[str], concurrency: int) -> Seen:
    requests = [JudgeRequest(text, (("user", text),), 16, 0.0) for text in texts]
    command = [sys.executable, "-m", "benchmarks.judging", "--serve"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server,
    ):
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        settings = JudgeSettings(model="m", base_url=url, key_env=None, concurrency=concurrency)
        judged = Judge(settings, Judgments(open_store(Path(folder)).backend)).ask(requests)
        assert judged.counts.answered == len(texts)
        return Seen(*json.loads(server.communicate()[0]))


if __name__ == "__main__":
    main()
