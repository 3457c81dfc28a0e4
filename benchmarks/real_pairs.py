"""Real preference pairs as SmolLM2-135M-Instruct's token ids."""

import numpy as np

from fpo_core.data.batches import PairIds
from fpo_core.data.conversations.reader import read_source
from fpo_core.data.render import ChatFormat
from fpo_core.data.tokenize import TokenizedPair, Tokenizer
from fpo_core.data.truncation import Limits
from fpo_core.models.load import load_tokenizer, model_folder
from fpo_core.recipe import load_recipe

SEED = 0


def real_pairs(data: str, longest: int, count: int) -> list[PairIds]:
    """Some of the pairs that fit, drawn with a seed.

    Args:
        data: preference pairs, JSON or JSONL.
        longest: most tokens of a prompt with one of its answers.
        count: how many.
    """
    tokenizer = load_tokenizer(model_folder(load_recipe("quickstart").model.source))
    tokenize = Tokenizer(ChatFormat(tokenizer, "model"), Limits(None, longest)).tokenize
    fitting = [
        PairIds(pair.pair_id, pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        for pair in tokenize(read_source(data))
        if isinstance(pair, TokenizedPair)
    ]
    rows = np.random.default_rng(SEED).choice(len(fitting), count, replace=False)
    return [fitting[row] for row in rows]
