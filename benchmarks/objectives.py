"""Memory and time of log-probabilities: ours beside the naive computation.

    python -m benchmarks.objectives [--tokens 4096] [--rounds 3]

``python -m benchmarks.steps`` compares whole training steps.

Forward and backward over hidden states of width 576 (SmolLM2-135M's) and a head of 49,152 and of
256,000 tokens, float32. Each measurement is a process of its own, the variants in turn; peak memory
is the process's above what it was before the step. Prints a Markdown table.
"""

import argparse
import subprocess
import sys
import time

from benchmarks.peak import PeakMemory

VOCABULARIES, WIDTH = (49_152, 256_000), 576
VARIANTS = ("naive", "ours")


def main() -> None:
    """Measure and print; with ``--one`` measure a variant in this process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "VOCABULARY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        variant, vocabulary = options.one
        print(*_measure(variant, int(vocabulary), options.tokens))
        return
    print("| vocabulary | variant | peak memory, MiB | seconds | memory / naive | time / naive |")
    print("|---|---|---|---|---|---|")
    for vocabulary in VOCABULARIES:
        _compare(vocabulary, options.tokens, options.rounds)


def _compare(vocabulary: int, tokens: int, rounds: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            command = [sys.executable, "-m", "benchmarks.objectives", "--tokens", str(tokens)]
            command += ["--one", variant, str(vocabulary)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            memory, seconds = (float(number) for number in done.stdout.split())
            found[variant].append((memory, seconds))
    naive_memory, naive_seconds = (_median([m[i] for m in found["naive"]]) for i in (0, 1))
    for variant, measured in found.items():
        memory, seconds = (_median([m[i] for m in measured]) for i in (0, 1))
        spread = f"{min(s for _, s in measured):.1f}-{max(s for _, s in measured):.1f}"
        print(
            f"| {vocabulary:,} | {variant} | {memory:,.0f} | {seconds:.1f} ({spread}) | "
            f"{memory / naive_memory:.3f} | {seconds / naive_seconds:.2f} |",
            flush=True,
        )


def _measure(variant: str, vocabulary: int, tokens: int) -> tuple[float, float]:
    """Peak memory in MiB above the start, and seconds of one forward and backward."""
    import torch

    from fpo_core.logprobs import Head, selected_logps

    torch.manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, WIDTH)).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))

    def step(count: int) -> None:
        if variant == "ours":
            logps = selected_logps(hidden[:count], Head(weight), targets[:count])
        else:
            logits = hidden[:count] @ weight.T
            logps = torch.log_softmax(logits, -1).gather(1, targets[:count, None]).squeeze(1)
        logps.sum().backward()
        hidden.grad = weight.grad = None

    step(8)  # the libraries' own buffers
    with PeakMemory() as memory:
        started = time.perf_counter()
        step(tokens)
        seconds = time.perf_counter() - started
    return memory.added, seconds


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
