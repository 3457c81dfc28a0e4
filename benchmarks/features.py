"""The features stage beside the bare forward pass, the bare encoder, and sae-lens' own cache.

    python -m benchmarks.features --data ../shared/data/preferences/dpo_en_demo.json

SmolLM2-135M-Instruct and real preference pairs, read at layer 20 by a JumpReLU SAE with random
directions of which 50 features a token fire. Of the same length-sorted batches, in turn:

- ``forward``: the model's blocks up to the layer, on rows laid out as the stage's, nothing else;
- ``matmul``: scored activations times the encoder's weight and nothing else;
- ``features``: the stage's pass: everything from token ids to Parquet shards in a store, the merge
  of the statistics included;
- ``reference`` and ``reference + features``: the same for the log-probs, alone and in one pass;
- ``sae-lens``: its CacheActivationsRunner on rows of prompt and answer, packed without padding,
  which stores the activations and encodes nothing. It reads a pair's prompt twice; tokens are
  counted alike for both, as it reads them.

With ``--shape gemma2-2b``, on a GPU, all but the last with random weights of that shape in bfloat16
and made pairs, at the layer of the shape and within the budget of tokens that is found.

A ratio is of one round's times; medians and the range over the rounds are printed. With
``--memory`` instead: the peak of the features pass of gemma2-tiny over 300 and over 30,000 pairs,
in a loop of its own that writes a shard before it computes the next; the stage does both at once.
"""

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.peak import PeakMemory
from benchmarks.real_pairs import real_pairs
from benchmarks.shapes import SHAPES, shape_model, varied_pairs
from fpo_core.data.batches import PairIds, batches_by_length, collate
from fpo_core.data.prompt_rows import rows_of
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.budget import CPU_TOKENS, TokenBudget, token_budget
from fpo_core.models.forward import decoder_inputs, laid_out, prompt_cost, scored_activations
from fpo_core.models.hooks import StopForward, capture_activations
from fpo_core.models.load import inference_device, load_model, model_folder, prepare_cpu
from fpo_core.models.random_gemma import SAE_PLACE, make_tiny_gemma
from fpo_core.offline import WantedFeatures, pass_shard, score_shard
from fpo_core.progress import not_shown
from fpo_core.quiet import set_quiet_defaults
from fpo_core.recipe import load_recipe
from fpo_core.recipe.schema import FeatureSettings
from fpo_core.sae.coder import SparseCoder, load_coder
from storage.location import open_store
from storage.manifest import Made
from storage.writer import ArtifactWriter
from tasks.fanout import ShardDone, Todo
from tasks.features import merge_statistics
from tasks.offline import ComputedShard, feature_tables, in_process, write_shard

HERE, L0, SEED = Hookpoint(20), 50, 0
# Few on a GPU: what is left to write after the last shard is then as little as in a long run.
SHARD_PAIRS, GPU_SHARD_PAIRS = 64, 16
ROWS_PER_BATCH = 8  # sae-lens': as many tokens as ours
SETTINGS = FeatureSettings(cache_k=256, tokens_k=32)
RECIPE = load_recipe("quickstart")

Timed = dict[str, list[float]]


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="preference pairs, JSON or JSONL")
    parser.add_argument("--shape", choices=SHAPES, help="instead of --data: random weights")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--widths", nargs="+", type=int, default=[4608, 16_384])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", nargs="*", type=int, metavar="PAIRS", help="see above")
    parser.add_argument("--one", type=int, metavar="PAIRS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    set_quiet_defaults()
    if options.one:
        print(_peak(options.one))
    elif options.memory is not None:
        _memory(options.memory or [300, 30_000])
    elif options.shape:
        _speed_of_shape(options)
    elif options.data is None:
        parser.error("--data or --shape is needed, but with --memory")
    else:
        _speed(options)


def _speed(options: argparse.Namespace) -> None:
    prepare_cpu(None)
    folder = model_folder(RECIPE.model.source)
    model = load_model(folder, dtype="float32", attention=RECIPE.model.attention)
    pairs = real_pairs(options.data, 512, options.pairs)
    works = _works(model, pairs, HERE, TokenBudget(CPU_TOKENS), options.widths)
    with _sae_lens(folder, pairs) as runner:
        works["sae-lens"] = runner
        times, results = _in_turn(works, options.rounds)
    _print_speed(times, options.widths, pairs)
    for width in options.widths:
        print(f"rate / sae-lens' at {width:,}: {_ratio(times, 'sae-lens', f'features {width}')}")
    size = results[f"features {options.widths[-1]}"] / _scored(pairs)
    theirs = results["sae-lens"]
    print(f"bytes a scored token, tokens table: {size:.0f}; sae-lens: {theirs:.0f} a token")


def _speed_of_shape(options: argparse.Namespace) -> None:
    shape = SHAPES[options.shape]
    model = shape_model(shape, inference_device()).to(torch.bfloat16).eval()
    budget = token_budget(model, "auto", 2 * (shape.prompt + shape.response))
    print(f"tokens a forward pass: {budget.tokens:,}")
    pairs = varied_pairs(shape, options.pairs)
    works = _works(model, pairs, Hookpoint(shape.layer), budget, options.widths)
    times, results = _in_turn(works, options.rounds)
    _print_speed(times, options.widths, pairs)
    size = results[f"features {options.widths[-1]}"] / _scored(pairs)
    print(f"bytes a scored token, tokens table: {size:.0f}")


def _scored(pairs: Sequence[PairIds]) -> int:
    return sum(sum(pair.scored) for pair in pairs)


def _works(
    model: Any, pairs: Sequence[PairIds], place: Hookpoint, budget: TokenBudget,
    widths: Sequence[int],
) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """What is measured, by name; the encoder's part on the activations that the stage reads."""
    rows = [row.ids for row in rows_of(pairs, prompt_cost(model))]
    batches = [
        collate([rows[row] for row in numbers], device=str(model.device))
        for numbers in batches_by_length([row.length for row in rows], budget.tokens)
    ]
    with torch.no_grad():
        x = torch.cat([scored_activations(model, batch, [place])[0] for batch in batches])
    works: dict[str, Callable[[], Any]] = {"forward": lambda: _forward(model, batches, place)}
    works["reference"] = lambda: _stage(model, pairs, [], budget, want_reference=True)
    for width in widths:
        coder = _random_sae(x, width)
        wanted = [WantedFeatures(coder, place, SETTINGS)]
        works[f"matmul {width}"] = lambda coder=coder: _matmul(x, coder)
        for name, reference in (("features", False), ("both", True)):
            works[f"{name} {width}"] = lambda wanted=wanted, reference=reference: _stage(
                model, pairs, wanted, budget, want_reference=reference
            )
    return works


def _in_turn(works: dict[str, Callable[[], Any]], rounds: int) -> tuple[Timed, dict[str, Any]]:
    times: Timed = {name: [] for name in works}
    results = {}
    for number, name in itertools.product(range(-1, rounds), works):  # the first is a warm-up
        if number < 0 and name == "sae-lens":
            continue
        started = time.perf_counter()
        results[name] = works[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= 0:
            # Its runner loads nothing within: what it returns is its own time, and bytes a token.
            seconds = time.perf_counter() - started
            if name == "sae-lens":
                seconds, results[name] = results[name]
            times[name].append(seconds)
    return times, results


def _ratio(times: Timed, work: str, *parts: str) -> str:
    """Median and range over the rounds of a work's time beside the sum of others'."""
    found = [
        of / sum(round_parts)
        for of, *round_parts in zip(times[work], *(times[part] for part in parts), strict=True)
    ]
    return f"{statistics.median(found):.3f} ({min(found):.3f}-{max(found):.3f})"


def _print_speed(times: Timed, widths: Sequence[int], pairs: Sequence[PairIds]) -> None:
    tokens = sum(pair.length for pair in pairs)
    print(f"{len(pairs)} pairs, {tokens:,} tokens, {_scored(pairs):,} of them scored\n")
    print("| d_sae | features / (forward + matmul) | both / (reference + matmul) | tokens/s |")
    print("|---|---|---|---|")
    for width in widths:
        matmul, rate = f"matmul {width}", tokens / statistics.median(times[f"features {width}"])
        print(
            f"| {width:,} | {_ratio(times, f'features {width}', 'forward', matmul)} "
            f"| {_ratio(times, f'both {width}', 'reference', matmul)} | {rate:,.0f} |"
        )
    print("seconds: " + ", ".join(f"{n} {statistics.median(t):.2f}" for n, t in times.items()))


def _random_sae(x: torch.Tensor, width: int) -> SparseCoder:
    """Random directions, with thresholds that let ``L0`` features a token fire on average."""
    generator = torch.Generator(x.device).manual_seed(SEED)
    x = x.float()
    weight = torch.randn(x.shape[1], width, generator=generator, device=x.device)
    weight /= weight.norm(dim=0)
    sample = (x[:: max(1, len(x) // 1024)] - x.mean(0)) @ weight
    threshold = torch.quantile(sample, 1 - L0 / width, dim=0).clamp_min(1e-3)
    return SparseCoder(weight, -x.mean(0) @ weight, threshold, None, x.mean(0), False, "")


@torch.no_grad()
def _forward(model: Any, batches: Sequence[Any], place: Hookpoint) -> None:
    decoder = model.get_decoder()
    for batch in batches:
        rows = laid_out(model, batch)
        with capture_activations(model, [place], stop=True), suppress(StopForward):
            decoder(
                input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False,
                **decoder_inputs(model, rows),
            )  # fmt: skip


@torch.no_grad()
def _matmul(x: torch.Tensor, coder: SparseCoder) -> None:
    for part in coder.chunks(len(x)):
        torch.mm(x[part].float(), coder.W_enc)


class _Stage(NamedTuple):
    """The stages' pass over made shards, written as it is computed."""

    model: Any
    pairs: Sequence[PairIds]
    saes: Sequence[WantedFeatures]
    budget: TokenBudget
    want_reference: bool
    writers: Mapping[str, ArtifactWriter]
    shard_pairs: int

    def compute(self, todo: Todo, on_tokens: Callable[[int], None]) -> ComputedShard:
        """Score a shard's pairs."""
        begin = todo.shard * self.shard_pairs
        passed = pass_shard(
            self.model, self.pairs[begin : begin + self.shard_pairs], self.saes,
            want_reference=self.want_reference, budget=self.budget, on_tokens=on_tokens,
        )  # fmt: skip
        return ComputedShard(todo.shard, ("features",) if self.saes else (), passed)

    def write(self, computed: ComputedShard) -> ShardDone:
        """Make and write its tables."""
        return write_shard(computed, self.writers)


def _stage(
    model: Any, pairs: Sequence[PairIds], saes: Sequence[WantedFeatures], budget: TokenBudget,
    *, want_reference: bool,
) -> int:  # fmt: skip
    """Score, write and merge as the stages do; returns the bytes of the token table."""
    shard_pairs = SHARD_PAIRS if model.device.type == "cpu" else GPU_SHARD_PAIRS
    with tempfile.TemporaryDirectory() as folder, _writers(folder) as writers:
        stage = _Stage(model, pairs, saes, budget, want_reference, writers, shard_pairs)
        shards = range(-(-len(pairs) // shard_pairs))
        for _ in in_process(stage, writers, [Todo(shard, ()) for shard in shards], not_shown):
            pass
        if saes:
            features = writers["features"]
            merge_statistics(features, SETTINGS.examples)
            features.commit(Made(1, {}, {}, {}, 0.0, {}))
        return sum(file.stat().st_size for file in Path(folder).rglob("data/tokens/*.parquet"))


@contextmanager
def _writers(folder: str) -> Iterator[dict[str, ArtifactWriter]]:
    store = open_store(folder)
    names = ("reference", "features")
    with store.hold(names[0], "0" * 16, None) as one, store.hold(names[1], "0" * 16, None) as two:
        assert one is not None
        assert two is not None
        yield {
            name: store.writer(name, "0" * 16, hold)
            for name, hold in zip(names, (one, two), strict=True)
        }


@contextmanager
def _sae_lens(
    folder: Path, pairs: Sequence[PairIds], context: int = 256
) -> Iterator[Callable[[], tuple[float, float]]]:
    """Its runner on rows of prompt and answer; gives seconds for all the pairs."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    sides = [(pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    ids = [int(i) for prompt, response in sides for i in (*prompt, *response)]
    rows = [ids[n : n + context] for n in range(0, len(ids) - context + 1, context)]
    del rows[len(rows) // ROWS_PER_BATCH * ROWS_PER_BATCH :]
    dataset = Dataset.from_dict({"tokens": rows})
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "activations"

        def run() -> tuple[float, float]:
            shutil.rmtree(target, ignore_errors=True)
            runner = CacheActivationsRunner(
                CacheActivationsRunnerConfig(
                    dataset_path="", model_name=str(folder), model_batch_size=ROWS_PER_BATCH,
                    hook_name=f"model.layers.{HERE.layer}", d_in=576,
                    training_tokens=len(rows) * context, context_size=context,
                    model_class_name="AutoModelForCausalLM", device="cpu", prepend_bos=False,
                    new_cached_activations_path=str(target), shuffle=False, streaming=False,
                    # One buffer: of fewer rows than it takes it would read some again.
                    buffer_size_gb=len(rows) * context * 576 * 4 / 1e9,
                ),
                override_dataset=dataset,
            )  # fmt: skip
            started = time.perf_counter()
            runner.run()
            seconds = time.perf_counter() - started
            size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            tokens = len(rows) * context
            return seconds * len(ids) / tokens, size / tokens

        yield run


def _memory(counts: Sequence[int]) -> None:
    print("| pairs | peak, MiB | / the first |")
    print("|---|---|---|")
    first = None
    for count in counts:
        command = [sys.executable, "-m", "benchmarks.features", "--one", str(count)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peak = float(done.stdout.strip().splitlines()[-1])
        first = first or peak
        print(f"| {count:,} | {peak:,.0f} | {peak / first:.3f} |", flush=True)


def _peak(count: int) -> float:
    """Peak memory of the features' pass over so many made-up pairs, shard by shard."""
    prepare_cpu(1)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_gemma(Path(folder) / "gemma")
        model = load_model(Path(folder) / "gemma" / "model", dtype="float32", attention="eager")
        coder = load_coder(Path(folder) / "gemma" / SAE_PLACE)
        saes = [WantedFeatures(coder, Hookpoint(2), SETTINGS)]
        with PeakMemory() as memory, _writers(folder) as writers:
            features = writers["features"]
            for shard in range(-(-count // SHARD_PAIRS)):
                pairs = _made_pairs(shard, min(SHARD_PAIRS, count - shard * SHARD_PAIRS))
                scores = score_shard(
                    model, pairs, saes, want_reference=False, budget=TokenBudget(CPU_TOKENS)
                )
                (columns,) = scores.features
                features.put_shard(shard, feature_tables(columns))
            merge_statistics(features, SETTINGS.examples)
        return memory.peak


def _made_pairs(shard: int, count: int) -> list[PairIds]:
    draw = np.random.default_rng(shard)

    def ids(low: int, high: int) -> np.ndarray:
        return draw.integers(300, 2000, draw.integers(low, high))

    return [
        PairIds(f"{shard:08x}{n:08x}", ids(10, 60), ids(5, 80), ids(5, 80)) for n in range(count)
    ]


if __name__ == "__main__":
    main()
