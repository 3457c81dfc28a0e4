"""Token lengths of examples: means and a histogram, before and after what did not fit."""

from collections import Counter
from typing import Any, NamedTuple

# Upper edges of the histogram's bins, in tokens; longer rows share the last bin.
EDGES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)


class ExampleLengths(NamedTuple):
    """Tokens of one example."""

    prompt: int
    answers: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with its longest answer."""
        return self.prompt + max(self.answers)


class Lengths:
    """Means and a histogram over examples, gathered one by one."""

    def __init__(self) -> None:
        self.examples = self.answers = 0
        self.prompt_tokens = self.answer_tokens = 0
        self._bins: Counter[int] = Counter()

    def add(self, lengths: ExampleLengths) -> None:
        """Take in an example."""
        self.examples += 1
        self.answers += len(lengths.answers)
        self.prompt_tokens += lengths.prompt
        self.answer_tokens += sum(lengths.answers)
        self._bins[_bin(lengths.longest)] += 1

    @property
    def mean_prompt(self) -> float | None:
        """Return the mean tokens of a prompt, None without examples."""
        return self.prompt_tokens / self.examples if self.examples else None

    @property
    def mean_answer(self) -> float | None:
        """Return the mean tokens of an answer, None without examples."""
        return self.answer_tokens / self.answers if self.answers else None

    @property
    def histogram(self) -> list[int]:
        """Return examples per bin of `EDGES`, and of longer ones last."""
        return [self._bins[number] for number in range(len(EDGES) + 1)]

    def as_json(self) -> dict[str, Any]:
        """Return the numbers as plain values, for a manifest."""
        return {
            "examples": self.examples,
            "mean_prompt": _rounded(self.mean_prompt),
            "mean_answer": _rounded(self.mean_answer),
            "histogram": self.histogram,
        }


def _bin(tokens: int) -> int:
    return next((number for number, edge in enumerate(EDGES) if tokens <= edge), len(EDGES))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
