"""Whole training steps of the objectives, side by side: time and peak memory.

    python -m benchmarks.steps
    python -m benchmarks.steps --shape gemma2-2b --variants dpo-live simpo tdpo1 tdpo2 fpo:16384

The first compares SimPO with FPO on SmolLM2-135M's shape. A step is what the train stage does with
a batch: forward, loss with caches and SAE, backward and optimizer, on a DeepSpeed engine. Weights
and SAE are random, of the named shape: neither time nor memory depends on their values.
``dpo-live`` is DPO with a reference model in memory instead of the cache, as general trainers have
it; ``simpo`` reads no features at all, where the train stage would also measure them. ``fpo:N`` has
an SAE of N features.

Time: in one process on one engine, the variants in turn, each round's time divided by that
round's first variant. Tokens are counted without padding. TFLOP/s are the model's: three times the
matrix products of the policy's forward pass over the batch, whatever is recomputed or computed
beside it; on a GPU that is known also as a share of its dense bfloat16 peak (MFU). Memory: three
processes each, the whole of their peak during the second step; on a GPU what torch allocated, of
one process. The
second command is the paper's Figure 4; it needs one GPU with 80 GB, where it computes in bfloat16
with float32 masters.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peak import PeakMemory
from benchmarks.shapes import GEMMA2, SHAPES, Shape, shape_model, shape_pairs
from fpo_core.data.batches import PairBatch, collate
from fpo_core.features.discrepancy import CachedFeatures
from fpo_core.features.pool import pool_features, top_features
from fpo_core.hookpoint import Hookpoint
from fpo_core.logprobs import output_head
from fpo_core.models.forward import forward_pairs, reference_side, scored_hidden
from fpo_core.quiet import set_quiet_defaults
from fpo_core.recipe.schema import Offload
from fpo_core.recipe.training import TrainSettings, ZeroStage
from fpo_core.sae.coder import AttachedSae, SparseCoder
from fpo_core.training.cached import CachedBatch
from fpo_core.training.engine import make_engine, start_distributed
from fpo_core.training.loss import PairLoss

CACHE_K = 256
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bfloat16, makers' data sheets


def main() -> None:
    """Measure and print a Markdown table; with ``--one`` measure in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--variants", nargs="+", default=["simpo", "fpo:16384", "fpo:65536"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, help="pairs a step; default: the shape's")
    parser.add_argument("--zero-stage", type=int, choices=get_args(ZeroStage), default=0)
    parser.add_argument("--offload", choices=get_args(Offload), default="none")
    parser.add_argument("--one", choices=("time", "memory"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.pairs:
        shape = shape._replace(pairs=options.pairs)
    if options.one == "time":
        bench = _Bench(shape, options.variants, options.zero_stage, options.offload)
        print(json.dumps(_times(bench, options.variants, options.rounds)))
    elif options.one == "memory":
        bench = _Bench(shape, options.variants, options.zero_stage, options.offload)
        print(json.dumps(_memory(bench, options.variants[0])))
    else:
        _table(options, shape.pairs)


def _table(options: argparse.Namespace, pairs: int) -> None:
    variants = options.variants
    common = [
        "--shape", options.shape, "--pairs", str(pairs), "--rounds", str(options.rounds),
        "--zero-stage", str(options.zero_stage), "--offload", options.offload,
    ]  # fmt: skip
    times, tokens, flops = _measured([*common, "--one", "time", "--variants", *variants])
    peak_flops = _peak_flops()
    memory = {name: _peaks(common, name) for name in variants}
    first = variants[0]
    print(
        f"| step | seconds | time / {first} | tokens/s | TFLOP/s | MFU | peak, MiB | of it the SAE "
        f"| peak / {first} |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in variants:
        ratios = [one / base for one, base in zip(times[name], times[first], strict=True)]
        peaks, sae = memory[name]
        peak, base = statistics.median(peaks), statistics.median(memory[first][0])
        seconds = statistics.median(times[name])
        share = f"{flops / seconds / peak_flops:.0%}" if peak_flops else "-"
        print(
            f"| {name} | {seconds:.2f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}-{max(ratios):.3f}) | {tokens / seconds:,.0f} | "
            f"{flops / seconds / 1e12:.2f} | {share} | {peak:,.0f} "
            f"({min(peaks):,.0f}-{max(peaks):,.0f}) | {sae:,.0f} | {peak / base:.3f} |"
        )


def _peak_flops() -> float | None:
    """What this GPU could do a second; None on a CPU, or a GPU that is not known here."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def _peaks(common: Sequence[str], name: str) -> tuple[list[float], float]:
    """Peak MiB of three processes, and the SAE's weights' part; a GPU's allocator repeats."""
    repeats = 1 if torch.cuda.is_available() else 3
    found = [_measured([*common, "--one", "memory", "--variants", name]) for _ in range(repeats)]
    return [peak for peak, _ in found], found[0][1]


def _measured(arguments: Sequence[str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.steps", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


class _Bench:
    """One engine, one batch, and the losses of the variants."""

    def __init__(
        self, shape: Shape, variants: Sequence[str], zero_stage: ZeroStage, offload: Offload
    ) -> None:
        self.device = alone()
        self.half = self.device != "cpu"
        self.hookpoint = Hookpoint(shape.layer)
        model = shape_model(shape, self.device)
        live = {"dpo-live", "tdpo1", "tdpo2"} & set(variants)
        self.reference = self._frozen(shape) if live else None
        self.batch = collate(shape_pairs(shape), device=self.device)
        settings = TrainSettings(
            activation_checkpointing=shape.kind == GEMMA2, zero_stage=zero_stage
        )
        engine = make_engine(model, (), settings, 100, half=self.half, offload=offload)
        self.engine, self.policy = engine, engine.module
        self.losses = {name: self._loss(name, shape) for name in variants}
        self.caches = {
            name: cached_as_offline(self.policy.model, self.batch, loss)
            for name, loss in self.losses.items()
        }

    def _frozen(self, shape: Shape) -> Any:
        reference = shape_model(shape, self.device)
        reference.to(torch.bfloat16 if self.half else torch.float32)
        return reference.requires_grad_(requires_grad=False).eval()

    def _loss(self, name: str, shape: Shape) -> PairLoss:
        method, _, width = name.partition(":")
        saes = [AttachedSae(self._coder(shape, int(width)), self.hookpoint)] if width else []
        constrained = method in ("tdpo1", "tdpo2")
        settings = TrainSettings(method=method.partition("-")[0])
        live = functools.partial(reference_side, self.reference)
        return PairLoss(settings, saes, live if constrained else None)

    def _coder(self, shape: Shape, d_sae: int) -> SparseCoder:
        """A random JumpReLU SAE whose threshold leaves about 50 features a token."""
        d_in = shape.config["hidden_size"]
        weight = torch.randn(d_in, d_sae) / d_in**0.5
        coder = SparseCoder(
            weight, torch.zeros(d_sae), torch.full((d_sae,), 2.7), None, torch.zeros(d_in),
            centred=False, hook="",
        )  # fmt: skip
        return coder.to(self.device)

    def step(self, name: str) -> float:
        """One optimizer step; returns its seconds."""
        loss, cached = self.losses[name], self.caches[name]
        self._synchronize()
        started = time.perf_counter()
        self.policy.hookpoints = loss.hookpoints
        out = self.engine(self.batch, loss.live(self.batch))
        if name == "dpo-live":
            with torch.no_grad():
                cached = cached._replace(logps=forward_pairs(self.reference, self.batch, ()).logps)
        result = loss(self.batch, out, cached)
        self.engine.backward(result.losses.mean())
        self.engine.step()
        self._synchronize()
        return time.perf_counter() - started

    @torch.no_grad()
    def flops(self) -> float:
        """FLOP of the policy's forward pass and a backward of twice that."""
        model = self.policy.model
        with FlopCounterMode(display=False) as counter:
            scored_hidden(model, self.batch)
        vocabulary, width = output_head(model).weight.shape
        # The head may be one kernel, which the counter does not see.
        head = 2 * vocabulary * width * len(self.batch.positions)
        return 3.0 * (counter.get_total_flops() + head)

    def _synchronize(self) -> None:
        if self.half:
            torch.cuda.synchronize()


def alone() -> str:
    """A process group of this one process; returns its device."""
    os.environ |= {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }  # fmt: skip
    return start_distributed()


@torch.no_grad()
def cached_as_offline(model: Any, batch: PairBatch, loss: PairLoss) -> CachedBatch:
    """The reference side as the caches would have it: of the policy itself, before step 1."""
    out = forward_pairs(model, batch, loss.hookpoints)
    rows = []
    for sae, activations in zip(loss.saes, out.activations, strict=True):
        pooled = pool_features(sae.coder, activations, batch.response, batch.lengths)
        cutoff = torch.zeros(len(pooled), device=pooled.device)
        rows.append(CachedFeatures(top_features(pooled, CACHE_K), cutoff))
    nothing = torch.zeros(len(batch.lengths), 0, device=batch.lengths.device)
    return CachedBatch(out.logps, tuple(rows), (), nothing)


def _times(
    bench: _Bench, variants: Sequence[str], rounds: int
) -> tuple[dict[str, list[float]], int, float]:
    """Seconds of each round's step; tokens and the model's FLOP of a step."""
    for name in variants:
        bench.step(name)
    every: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        # Forwards and backwards in turn, so that a drift of the machine falls on all alike.
        for name in variants if number % 2 == 0 else reversed(variants):
            every[name].append(bench.step(name))
    return every, bench.batch.num_tokens, bench.flops()


def _memory(bench: _Bench, variant: str) -> tuple[float, float]:
    """Peak MiB of a step, optimizer state and weights included, and the SAE's weights' part."""
    bench.step(variant)
    with PeakMemory(cuda=bench.half) as memory:
        bench.step(variant)
    weights = sum(sae.coder.W_enc.nbytes for sae in bench.losses[variant].saes)
    return memory.peak, weights / 2**20


if __name__ == "__main__":
    set_quiet_defaults()
    main()
