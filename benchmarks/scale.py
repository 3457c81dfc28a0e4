"""A features artifact of very many responses: how large, how long, and in how much memory.

    python -m benchmarks.scale
    python -m benchmarks.scale --responses 1000000 --tokens-share 0

The passes of model and SAE are left out: synthetic active features go through what the stage does
with them, shard by shard into a store in a temporary folder, and the stage's own merge makes the
statistics. A token has about 60 active features of 16,384, drawn by a Zipf-like law, with values
that fall by a power law, as the quickstart's have; responses are short, or the disk would be what
is measured. Writing and merging are processes of their own, whose peak memory is the system's word.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.parquet_rows import popular
from fpo_core.data.batches import PairIds
from fpo_core.features.tables import FeatureTables, ScoredTokens
from fpo_core.lists import Lists, offsets_of
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import ActiveFeatures
from storage.location import open_store
from storage.manifest import Made
from storage.store import Store
from storage.version import artifact_version
from storage.writer import ArtifactWriter
from tasks.features import merge_statistics
from tasks.offline import feature_tables

D_SAE, VOCABULARY = 16_384, 49_152
PAIRS_PER_SHARD = 512
PARTS = ("write", "merge")
POOL = 65_536  # different tokens that the responses are made of
RECIPE, OF = {"layer": 0, "site": "resid_post"}, {"of": "benchmarks.scale"}
PAIRS_VERSION = artifact_version(stage="pairs", schema_version=0, recipe={}, inputs=OF)
INPUTS = {"pairs": PAIRS_VERSION, "sae": "benchmarks.scale"}
VERSION = artifact_version(stage="features", schema_version=0, recipe=RECIPE, inputs=INPUTS)


def main() -> None:
    """Measure each size; print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=6, help="mean tokens of a response")
    parser.add_argument("--tokens-share", type=float, default=1.0, help="as in a recipe")
    parser.add_argument(
        "--part", nargs=2, metavar=("write|merge", "FOLDER"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    settings = FeatureSettings(tokens_share=options.tokens_share)
    if options.part:
        part, folder = options.part
        _measure(part, open_store(folder), options.responses[0], options.tokens, settings)
        return
    print("| responses | written, s | peak MB | merged, s | peak MB | pooled, B | tokens, B | "
          "shard_stats, B a row | stats, B a row | together |")  # fmt: skip
    print("|" + "---|" * 10)
    for responses in options.responses:
        with tempfile.TemporaryDirectory(prefix="fpo-scale-") as folder:
            measured = {part: _in_own_process(part, folder, responses, options) for part in PARTS}
            print(_row(responses, measured, open_store(folder)), flush=True)


def _in_own_process(
    part: str, folder: str, responses: int, options: argparse.Namespace
) -> dict[str, float]:
    command = [
        sys.executable, "-m", "benchmarks.scale", "--part", part, folder, "--responses",
        str(responses), "--tokens", str(options.tokens), "--tokens-share",
        str(options.tokens_share),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(
    part: str, store: Store, responses: int, tokens: int, settings: FeatureSettings
) -> None:
    """Do one part, and print its seconds and its process's peak memory."""
    started = time.monotonic()
    with store.hold("features", VERSION, None) as hold:
        assert hold is not None
        writer = store.writer("features", VERSION, hold)
        if part == "write":
            write(writer, responses, tokens, settings)
        else:
            stats = merge_statistics(writer, settings.examples)
            writer.commit(Made(0, RECIPE, INPUTS, stats, 0.0, {}))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.monotonic() - started, "peak": peak}))


def write(writer: ArtifactWriter, responses: int, tokens: int, settings: FeatureSettings) -> None:
    """Write the shards of this many responses."""
    rng = np.random.default_rng(0)
    pool = _token_pool(rng)
    for number, size in enumerate(_shard_sizes(responses // 2)):
        pairs = [PairIds(rng.bytes(8).hex(), [0], [0], [0]) for _ in range(size)]
        tables = FeatureTables(pairs, D_SAE, settings)
        lengths = rng.poisson(tokens - 1, 2 * size) + 1
        tables.add(*_batch(rng, pool, lengths))
        writer.put_shard(number, feature_tables(tables.columns()))


def _shard_sizes(pairs: int) -> Iterator[int]:
    for begin in range(0, pairs, PAIRS_PER_SHARD):
        yield min(PAIRS_PER_SHARD, pairs - begin)


def _token_pool(rng: np.random.Generator) -> tuple[Lists, Lists]:
    """Active features and values of different tokens, features ascending, each once."""
    drawn = np.sort(popular(rng, D_SAE, (POOL, 80)), axis=1)
    first = np.ones(drawn.shape, bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    rank = rng.permuted(np.tile(np.arange(1, 81), (POOL, 1)), axis=1)
    values = 55 * rank**-0.55 * np.exp(rng.normal(0, 0.25, drawn.shape))
    offsets = offsets_of(first.sum(1))
    return Lists(drawn[first], offsets), Lists(values[first].astype(np.float32), offsets)


def _batch(
    rng: np.random.Generator, pool: tuple[Lists, Lists], lengths: np.ndarray
) -> tuple[ScoredTokens, ActiveFeatures]:
    """Responses of these lengths, of tokens drawn from the pool; each value is its own."""
    count = int(lengths.sum())
    rows = rng.integers(POOL, size=count)
    feature, value = (part.take(rows) for part in pool)
    scored = ScoredTokens(
        responses=np.arange(len(lengths)),
        lengths=lengths,
        positions=np.concatenate([np.arange(length) for length in lengths]),
        targets=popular(rng, VOCABULARY, count).astype(np.int32),
    )
    token = np.repeat(np.arange(count), feature.lengths)
    own = value.values * rng.uniform(0.8, 1.2, len(token)).astype(np.float32)
    return scored, ActiveFeatures(token, feature.values.astype(np.int64), own)


def _row(responses: int, measured: dict[str, Any], store: Store) -> str:
    manifest = store.artifact("features", VERSION).manifest
    size = Counter[str]()
    for name, record in manifest["files"].items():
        size[name.partition("/")[0]] += record["bytes"]
    rows = {**manifest["rows_by_table"], "stats": D_SAE}
    a_row = {table: size[table] / max(rows[table], 1) for table in size}
    cells = [
        f"{responses:,}",
        *(f"{measured[part][key]:,.0f}" for part in PARTS for key in ("seconds", "peak")),
        *(f"{a_row[table]:,.1f}" for table in ("pooled", "tokens", "shard_stats", "stats")),
        f"{manifest['bytes'] / 1e9:.2f} GB",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
