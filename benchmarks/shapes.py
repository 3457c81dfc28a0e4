"""Models of a named shape with random weights, and pairs: time and memory need no others."""

from typing import Any, NamedTuple

import numpy as np
import torch

from fpo_core.data.batches import PairIds

LLAMA, GEMMA2 = "llama", "gemma2"


class Shape(NamedTuple):
    """A model's shape, and the batch that one micro-step of it takes."""

    kind: str
    config: dict[str, Any]
    layer: int  # of the SAE
    pairs: int
    prompt: int
    response: int


SHAPES = {
    "smollm2-135m": Shape(
        LLAMA,
        {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
         "tie_word_embeddings": True},
        20, 4, 64, 96,
    ),
    "gemma2-2b": Shape(
        GEMMA2,
        {"vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216,
         "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
         "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 256},
        25, 2, 512, 768,
    ),
    "tiny": Shape(
        GEMMA2,
        {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
        1, 2, 8, 8,
    ),
}  # fmt: skip


def shape_model(shape: Shape, device: str = "cpu") -> Any:
    """A float32 causal LM of a shape, made on its device: there the random numbers are quick."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        if shape.kind == LLAMA:
            return LlamaForCausalLM(LlamaConfig(**shape.config)).float()
        config = Gemma2Config(**shape.config)
        config._attn_implementation = "eager"  # soft-capped attention logits
        return Gemma2ForCausalLM(config).float()


def shape_pairs(shape: Shape) -> list[PairIds]:
    """The pairs of a micro-step: random ids, all of the shape's lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(shape.config["vocab_size"], (count,), generator=generator).tolist()

    return [
        PairIds(
            pair_id=str(pair),
            prompt=ids(shape.prompt),
            chosen=ids(shape.response),
            rejected=ids(shape.response),
        )
        for pair in range(shape.pairs)
    ]


def varied_pairs(shape: Shape, count: int, seed: int = 0) -> list[PairIds]:
    """Pairs of random ids whose lengths vary as those of real ones do, about the shape's."""
    draw = np.random.default_rng(seed)

    def ids(typical: int) -> np.ndarray:
        length = int(np.clip(draw.lognormal(np.log(typical / 3), 0.7), 4, typical))
        return draw.integers(shape.config["vocab_size"], size=length)

    return [
        PairIds(
            pair_id=f"{seed:08x}{number:08x}",
            prompt=ids(shape.prompt),
            chosen=ids(shape.response),
            rejected=ids(shape.response),
        )
        for number in range(count)
    ]
