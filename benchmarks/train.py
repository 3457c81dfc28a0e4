"""Our training step beside the bare model's forward and backward, and beside TRL's DPO.

    python -m benchmarks.train --data ../shared/data/preferences/dpo_en_demo.json

SmolLM2-135M-Instruct and real preference pairs, of those whose prompt and answers fit a length:
the same four pairs for all. ``bare`` is the model's own forward and backward with cross-entropy
over each answer's row, padded. ``trl-dpo`` is TRL's DPOTrainer with the reference's log-probs
given, its own collator and loss; ``dpo`` and ``fpo`` are our engine, loss and packed pairs, FPO
with the quickstart's SAE. The last three include AdamW's step. Tokens are counted alike, as rows
of prompt and answer without padding, though ours computes a pair's prompt once.

Time: in one process, in turn; each round's rate divided by that round's bare. Memory: a process
each, the whole of its peak during the second step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.peak import PeakMemory
from benchmarks.real_pairs import real_pairs
from benchmarks.steps import alone, cached_as_offline
from fpo_core.data.batches import PairIds, batches_by_length, collate
from fpo_core.models.forward import forward_pairs
from fpo_core.models.load import load_tokenizer, model_folder, prepare_cpu
from fpo_core.quiet import set_quiet_defaults
from fpo_core.recipe import load_recipe
from fpo_core.recipe.training import TrainSettings
from fpo_core.sae.coder import AttachedSae, load_coder
from fpo_core.sae.source import sae_folder
from fpo_core.training.engine import make_engine
from fpo_core.training.loss import PairLoss

VARIANTS = ("bare", "trl-dpo", "dpo", "fpo")
PAIRS, TOKENS_PER_BATCH = 4, 2048
RECIPE = load_recipe("quickstart")

Step = Callable[[], None]


def main() -> None:
    """Measure and print a Markdown table; with ``--one`` measure in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="preference pairs, JSON or JSONL")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=("time", *VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        pairs = real_pairs(options.data, options.lengths[0], PAIRS)
        measured = _times(pairs, options.rounds) if options.one == "time" else _memory(
            pairs, options.one
        )  # fmt: skip
        print(json.dumps(measured))
        return
    print("| longest | step | tokens/s | rate / bare | rate / TRL | peak, MiB | peak / TRL |")
    print("|---|---|---|---|---|---|---|")
    for length in options.lengths:
        _table(options.data, length, options.rounds)


def _table(data: str, length: int, rounds: int) -> None:
    common = ["--data", data, "--lengths", str(length), "--rounds", str(rounds)]
    times, tokens = _measured([*common, "--one", "time"])
    peaks = {name: _measured([*common, "--one", name]) for name in VARIANTS}
    for name in VARIANTS:
        rate = tokens / statistics.median(times[name])
        ratios = [_ratios(times[base], times[name]) for base in ("bare", "trl-dpo")]
        print(
            f"| {length} | {name} | {rate:.0f} | {ratios[0]} | {ratios[1]} | {peaks[name]:,.0f} | "
            f"{peaks[name] / peaks['trl-dpo']:.2f} |",
            flush=True,
        )


def _ratios(base: Sequence[float], one: Sequence[float]) -> str:
    found = [b / o for b, o in zip(base, one, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def _measured(arguments: Sequence[str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.train", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    folder = model_folder(RECIPE.model.source)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _bare(pairs: Sequence[PairIds]) -> Step:
    """Forward and backward with cross-entropy over the answers; no optimizer."""
    model = _model().train()
    rows = [([*p.prompt, *ids], len(ids)) for p in pairs for ids in (p.chosen, p.rejected)]
    width = max(len(row) for row, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, (row, scored) in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
        labels[number, len(row) - scored : len(row)] = torch.tensor(row[-scored:])

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def _ours(pairs: Sequence[PairIds], method: str) -> Step:
    """Engine, loss and packed pairs as the train stage has them."""
    saes = []
    if method == "fpo":
        assert RECIPE.sae.source is not None
        coder = load_coder(sae_folder(RECIPE.sae.source), decoder=False)
        saes = [AttachedSae(coder, RECIPE.sae.hookpoint)]
    settings = TrainSettings(method=method, optimizer="adamw")
    loss = PairLoss(settings, saes)
    engine = make_engine(_model(), loss.hookpoints, settings, 1000, half=False)
    groups = batches_by_length([pair.length for pair in pairs], TOKENS_PER_BATCH)
    batches = [collate([pairs[row] for row in rows]) for rows in groups]
    caches = [cached_as_offline(engine.module.model, batch, loss) for batch in batches]

    def step() -> None:
        for number, (batch, cached) in enumerate(zip(batches, caches, strict=True)):
            engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            result = loss(batch, engine(batch), cached)
            engine.backward(result.losses.sum() / len(pairs))
            engine.step()

    return step


def _trl(pairs: Sequence[PairIds]) -> Step:
    """TRL's DPOTrainer: its collator and its loss, the reference's log-probs given."""
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer, model = load_tokenizer(model_folder(RECIPE.model.source)), _model()
    with torch.no_grad():
        logps = forward_pairs(model, collate(pairs), ()).logps.float().reshape(-1, 2).tolist()
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=True, bf16=False,
        activation_checkpointing=False, remove_unused_columns=False,
        precompute_ref_log_probs=True,
    )  # fmt: skip
    rows = [
        {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected,
         "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        for pair, (chosen, rejected) in zip(pairs, logps, strict=True)
    ]  # fmt: skip
    trainer: Any = DPOTrainer(
        model=model, args=args, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )  # fmt: skip
    inputs = trainer.data_collator([dict(row) for row in rows])
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=5e-7, fused=True)

    def step() -> None:
        trainer.compute_loss(trainer.model.train(), dict(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _step(pairs: Sequence[PairIds], name: str) -> Step:
    if name == "bare":
        return _bare(pairs)
    return _trl(pairs) if name == "trl-dpo" else _ours(pairs, name)


def _times(pairs: Sequence[PairIds], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of each round's step, and the tokens of it."""
    alone()
    prepare_cpu(None)
    steps = {name: _step(pairs, name) for name in VARIANTS}
    every: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):  # the first one warms up
        for name in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
            started = time.perf_counter()
            steps[name]()
            if number:
                every[name].append(time.perf_counter() - started)
    tokens = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
    return every, tokens


def _memory(pairs: Sequence[PairIds], name: str) -> float:
    """Peak MiB of a step, weights and optimizer state included."""
    alone()
    prepare_cpu(None)
    step = _step(pairs, name)
    step()
    with PeakMemory() as memory:
        step()
    return memory.peak


if __name__ == "__main__":
    set_quiet_defaults()
    main()
