"""What asking a judge will cost, before anything is spent.

Tokens are counted by the judge's own encoding where tiktoken has it on this machine; nothing is
downloaded for an estimate. Elsewhere a token is taken to be four characters, OpenAI's own rule of
thumb for English.
"""

import hashlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fpo_core.bench.model import JudgeRequest
from fpo_core.judge.cache import JudgmentCache, read_entry
from fpo_core.judge.client import by_content
from fpo_core.recipe.judge import JudgeSettings

CHARACTERS_A_TOKEN = 4
# Of the chat format: each message's frame, and the start of the reply.
MESSAGE_TOKENS, REPLY_START_TOKENS = 4, 3
_ENCODINGS = "https://openaipublic.blob.core.windows.net/encodings/"


class Estimate(NamedTuple):
    """What is left to ask, and the most it can cost."""

    asked: int  # requests in all
    left: int  # of them to be sent: neither in the cache nor equal to another
    prompt_tokens: int
    most_reply_tokens: int  # where every reply is as long as it may be
    counted_by: str  # how the prompt's tokens were counted
    usd: float | None  # None without judge.price


def estimate_cost(
    settings: JudgeSettings, requests: Sequence[JudgeRequest], cache: JudgmentCache
) -> Estimate:
    """What asking these requests would cost at most; asks nothing."""
    contents = by_content(settings, requests, lambda _requests, _reason: None)
    entries = cache.get_all(contents)
    left = [
        same[0]
        for digest, same in contents.items()
        if digest not in entries or read_entry(digest, entries[digest]) is None
    ]
    counted_by, count = _counter(settings.model)
    prompt = sum(_prompt_tokens(request, count) for request in left)
    reply = sum(request.max_tokens for request in left)
    return Estimate(
        asked=len(requests),
        left=len(left),
        prompt_tokens=prompt,
        most_reply_tokens=reply,
        counted_by=counted_by,
        usd=usd(settings, prompt, reply),
    )


def usd(settings: JudgeSettings, prompt_tokens: int, reply_tokens: int) -> float | None:
    """What so many tokens cost; None where the recipe has no price."""
    price = settings.price
    if price is None:
        return None
    return (prompt_tokens * price.prompt + reply_tokens * price.reply) / 1e6


def _prompt_tokens(request: JudgeRequest, count: Callable[[str], int]) -> int:
    texts = sum(count(text) + MESSAGE_TOKENS for _, text in request.messages)
    return texts + REPLY_START_TOKENS


def _counter(model: str) -> tuple[str, Callable[[str], int]]:
    """How tokens are counted, in words, and the function that does."""
    name = _offline_encoding(model)
    if name is None:
        return (
            f"{CHARACTERS_A_TOKEN} characters a token",
            lambda text: math.ceil(len(text) / CHARACTERS_A_TOKEN),
        )
    import tiktoken

    encoding = tiktoken.get_encoding(name)
    return f"tiktoken's {name}", lambda text: len(encoding.encode(text, disallowed_special=()))


def _offline_encoding(model: str) -> str | None:
    """The model's encoding, where tiktoken knows it and has its file in its cache folder."""
    if importlib.util.find_spec("tiktoken") is None:
        return None
    from tiktoken.model import encoding_name_for_model

    try:
        name = encoding_name_for_model(model)
    except KeyError:
        return None
    # tiktoken names a file by its address, and would download one that is not there.
    file = hashlib.sha1(f"{_ENCODINGS}{name}.tiktoken".encode(), usedforsecurity=False).hexdigest()
    folder = (
        os.environ.get("TIKTOKEN_CACHE_DIR")
        or os.environ.get("DATA_GYM_CACHE_DIR")
        or Path(tempfile.gettempdir()) / "data-gym-cache"
    )
    return name if (Path(folder) / file).is_file() else None
