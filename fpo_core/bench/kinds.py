"""The kinds of benchmark, and the rules of each."""

from fpo_core.bench.alpaca_eval import AlpacaEval
from fpo_core.bench.arena_hard import ArenaHard
from fpo_core.bench.ifeval import IFEval
from fpo_core.bench.model import Benchmark
from fpo_core.bench.mt_bench import MtBench

KINDS: dict[str, Benchmark] = {
    rules.kind: rules for rules in (AlpacaEval(), ArenaHard(), MtBench(), IFEval())
}
