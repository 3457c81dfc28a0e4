"""What each stage costs, by calculation: tokens, bytes stored, floating-point operations.

A matrix of n parameters takes 2 n operations a token forward and 4 n backward. Left out are
attention's own products, norms and the optimizer (at 800 tokens a row some percent of the whole),
training's measurements on held-out pairs, and the answers that evaluation samples.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fpo_core.models.shape import ModelShape
from fpo_core.recipe import Recipe
from fpo_core.recipe.methods import METHODS
from fpo_core.recipe.training import OptimizerSettings
from tasks.plan import features_stages, kind_of
from tasks.texts import Texts

# Bytes of the tables, measured on the quickstart's artifacts (docs/scaling.md says how).
PAIR_TOKEN = 2.4  # of `pairs`, a token
REFERENCE_ROW = 66.0  # of `reference`, a pair
TOKEN_FEATURE = 4.82  # of features/tokens, a stored feature; the rest of the row included
POOLED_FEATURE = 4.83  # of features/pooled, the same
STATS_ROW, STATS_EXAMPLE = 41.0, 5.0  # of features/stats and shard_stats: a feature, an example
ACTIVE_A_RESPONSE = 820  # features that fire somewhere in a response, where all are kept
MODEL_PARAMETER = 4  # float32, as models are saved


class Cost(NamedTuple):
    """Of one stage; None where it is not known what it depends on."""

    tokens: float | None = None  # that go through the model, padding left out
    bytes: float | None = None  # stored
    flops: float | None = None
    pass_of: str = ""  # the stage whose pass does the work of this one


class Facts(NamedTuple):
    """All that the costs depend on."""

    recipe: Recipe
    shape: ModelShape | None
    widths: tuple[int | None, ...]  # d_sae of each SAE
    train: Texts | None
    heldout: Texts | None
    dialogues: Texts | None

    @property
    def pairs(self) -> Texts | None:
        """Of both splits."""
        if self.train is None or self.heldout is None:
            return None
        rows = self.train.rows + self.heldout.rows
        answers = (self.train.scored + self.heldout.scored) / rows
        prompt = (self.train.tokens + self.heldout.tokens) / rows - answers
        return Texts(rows, prompt, answers, self.train.known_from)


def stage_cost(stage: str, missing: Sequence[str], facts: Facts) -> Cost:
    """What a stage costs.

    Args:
        stage: its name.
        missing: all stages that the run computes: one pass can do the work of several.
        facts: what the costs depend on.
    """
    kind = kind_of(stage)
    if kind == "features":
        return _features(stage, missing, facts)
    if kind == "reference":
        return _reference(missing, facts)
    costs = {
        "instructions": _instructions, "sft": _sft, "sae": _sae, "tokenize": _tokenize,
        "train": _train, "evaluate": _evaluate, "generate": _unknown, "benchmark": _unknown,
    }  # fmt: skip
    return costs[kind](facts)


def _unknown(_facts: Facts) -> Cost:
    """How long answers become is the model's affair; an earlier artifact tells the rate."""
    return Cost()


def _instructions(facts: Facts) -> Cost:
    return _token_ids(facts.dialogues)


def _tokenize(facts: Facts) -> Cost:
    return _token_ids(facts.pairs)


def _token_ids(texts: Texts | None) -> Cost:
    return Cost(texts.tokens, PAIR_TOKEN * texts.tokens) if texts else Cost()


def _sae(facts: Facts) -> Cost:
    """Activations of at most ``max_tokens``, then steps over them."""
    settings, shape = facts.recipe.sae.train, facts.shape
    assert settings is not None
    if shape is None:
        return Cost(settings.max_tokens)
    collected = 2 * settings.max_tokens * (facts.recipe.sae.layer + 1) * shape.block_params
    params = 2 * shape.hidden * settings.d_sae  # encoder and decoder
    trained = 6 * settings.steps * settings.batch_tokens * params
    return Cost(settings.max_tokens, MODEL_PARAMETER * params, collected + trained)


def _reference(missing: Sequence[str], facts: Facts) -> Cost:
    """The whole model on every pair; the SAEs as well, whose features come of the same pass."""
    pairs = facts.pairs
    if pairs is None:
        return Cost()
    flops = _sum(_forward(facts, pairs), _encoded(facts, pairs, _wanted_saes(missing, facts)))
    return Cost(pairs.tokens, REFERENCE_ROW * pairs.rows, flops)


def _wanted_saes(missing: Sequence[str], facts: Facts) -> list[int]:
    """The SAEs whose features are missing; one pass makes them all."""
    return [n for n, name in enumerate(features_stages(facts.recipe)) if name in missing]


def _features(stage: str, missing: Sequence[str], facts: Facts) -> Cost:
    """The blocks up to the deepest SAE, and the encoders."""
    stages = features_stages(facts.recipe)
    pairs, width = facts.pairs, facts.widths[stages.index(stage)]
    stored = _features_bytes(facts, pairs, width) if pairs and width else None
    wanted = _wanted_saes(missing, facts)
    first = "reference" if "reference" in missing else stages[wanted[0]]
    if first != stage:
        return Cost(None, stored, pass_of=first)
    if pairs is None:
        return Cost(None, stored)
    flops = _sum(_blocks(facts, pairs, wanted), _encoded(facts, pairs, wanted))
    return Cost(pairs.tokens, stored, flops)


def _blocks(facts: Facts, texts: Texts, saes: Iterable[int]) -> float | None:
    """All tokens through the blocks that some SAEs need."""
    if facts.shape is None:
        return None
    depths = (
        facts.shape.layers if site == "final_norm" else layer + 1
        for layer, site in (facts.recipe.hookpoints[number] for number in saes)
    )
    return 2 * texts.tokens * max(depths) * facts.shape.block_params


def _features_bytes(facts: Facts, pairs: Texts, width: int) -> float:
    """Of pooled, tokens, the shards' statistics and the merged ones."""
    settings = facts.recipe.features
    kept = ACTIVE_A_RESPONSE if settings.cache_k == "all" else settings.cache_k
    pooled = 2 * pairs.rows * POOLED_FEATURE * min(kept, width)
    rows = pairs.scored * settings.tokens_share
    tokens = rows * TOKEN_FEATURE * min(settings.tokens_k, width)
    tables = 1 + -(-pairs.rows // facts.recipe.data.shard_pairs)
    return pooled + tokens + tables * width * (STATS_ROW + STATS_EXAMPLE * settings.examples)


def _train(facts: Facts) -> Cost:
    """Forward and backward, the encoders, and a live reference where the objective has a KL."""
    texts, settings, shape = facts.train, facts.recipe.train, facts.shape
    if texts is None:
        return Cost()
    tokens = settings.epochs * texts.tokens
    if shape is None:
        return Cost(tokens)
    method = METHODS[settings.method]
    every = range(len(facts.widths)) if method.constraint == "features" else ()
    live = _forward(facts, texts) if method.needs_reference_model else 0
    flops = _sum(_trained(shape, texts, settings), _encoded(facts, texts, every), live)
    epochs = None if flops is None else settings.epochs * flops
    return Cost(tokens, MODEL_PARAMETER * shape.params, epochs)


def _sft(facts: Facts) -> Cost:
    texts, settings, shape = facts.dialogues, facts.recipe.sft, facts.shape
    assert settings is not None
    if texts is None:
        return Cost()
    tokens = settings.epochs * texts.tokens
    if shape is None:
        return Cost(tokens)
    flops = settings.epochs * _trained(shape, texts, settings)
    return Cost(tokens, MODEL_PARAMETER * shape.params, flops)


def _evaluate(facts: Facts) -> Cost:
    """Policy and reference on the held-out pairs."""
    texts = facts.heldout
    if texts is None:
        return Cost()
    once = _sum(_forward(facts, texts), _encoded(facts, texts, [0]))
    return Cost(2 * texts.tokens, None, None if once is None else 2 * once)


def _forward(facts: Facts, texts: Texts) -> float | None:
    """All blocks on all tokens, the head on the scored ones."""
    if facts.shape is None:
        return None
    blocks = facts.shape.layers * facts.shape.block_params
    return 2 * (texts.tokens * blocks + texts.scored * facts.shape.head_params)


def _encoded(facts: Facts, texts: Texts, saes: Iterable[int]) -> float | None:
    """The encoders of some of the SAEs on the scored tokens."""
    width = _sum(*(facts.widths[number] for number in saes))
    if facts.shape is None or width is None:
        return None
    return 2 * texts.scored * facts.shape.hidden * width


def _trained(shape: ModelShape, texts: Texts, settings: OptimizerSettings) -> float:
    """An epoch: forward, twice that backward, and what backward computes again.

    The head's logits are always computed again, the blocks with activation checkpointing.
    """
    again = 2 if settings.activation_checkpointing else 0
    blocks = (6 + again) * texts.tokens * shape.layers * shape.block_params
    return blocks + (6 + 2) * texts.scored * shape.head_params


def _sum(*parts: float | None) -> float | None:
    """None when a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
