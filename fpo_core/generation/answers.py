"""What a backend is asked and what it answers.

An answer depends on its prompt, its settings and its own seed, and on nothing else that is asked
beside it: in other batches, in other shards and after a restart it is the same, up to rounding.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from fpo_core.data.conversations.model import Message

END_OF_TURN, LENGTH = "end of turn", "length"
# Of the finish reasons of OpenAI's API, which vLLM has, too; others stay as they are.
STOPS = {"stop": END_OF_TURN, "length": LENGTH}


class Sampling(NamedTuple):
    """How answers are sampled; each prompt has its own temperature and seed."""

    max_new_tokens: int
    top_p: float = 1.0
    stop: tuple[int, ...] = ()  # token ids that end an answer; an endpoint knows its model's


class Prompt(NamedTuple):
    """One answer that is wanted."""

    question_id: str
    turn: int  # of the question, from 0
    temperature: float  # 0 is greedy
    sample: int  # number among the answers to the same prompt
    seed: int
    messages: tuple[Message, ...]  # for endpoints, which apply the chat template themselves
    ids: Sequence[int]  # for models, up to the opener of the answer


class Generated(NamedTuple):
    """One answer."""

    prompt: Prompt
    answer_ids: list[int]  # end of turn included; empty where an endpoint gives none
    text: str  # without special tokens and white space at its ends
    stop: str  # "end of turn", "length", or an endpoint's own other reason
    tokens: int  # sampled, end of turn included; 0 where an endpoint does not say


class Backend(Protocol):
    """Something that answers prompts."""

    def generate(self, prompts: Sequence[Prompt]) -> Iterator[Generated]:
        """Answer all prompts, each as soon as it is done, in any order."""
        ...


def prompt_seed(seed: int, question_id: str, turn: int, temperature: float, sample: int) -> int:
    """The seed of one answer: 31 bits, which is what every backend takes."""
    key = json.dumps([seed, question_id, turn, float(temperature), sample])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) >> 1
