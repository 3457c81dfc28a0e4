"""A tiny random language model, tokenizer, SAE and data set, made on the spot as real files."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fpo_core.models.attention import attention_by_parts
from fpo_core.models.random_gemma import fit_decoder

HIDDEN, LAYERS, D_SAE, SAE_LAYER = 32, 3, 96, 1

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog user assistant"], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHATML
    return fast


def make_model(kind: str = "llama", seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random model: ``llama``, or ``gemma2`` with soft-capping and sliding windows.

    A Llama attends as ``load_model`` has it do on a CPU; ``llama-masked`` as on a GPU.
    """
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 400, "hidden_size": HIDDEN, "intermediate_size": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    if kind.startswith("llama"):
        config = LlamaConfig(**{**shape, "tie_word_embeddings": True, **overrides})
        config._attn_implementation = (
            "sdpa" if kind == "llama-masked" else attention_by_parts("sdpa", "cpu")
        )
        return LlamaForCausalLM(config).eval()
    soft = {"sliding_window": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 8}  # fmt: skip
    config = Gemma2Config(**{**shape, **soft, **overrides})
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config).eval()  # pyright: ignore[reportReturnType]


def save_model(folder: Path, kind: str = "llama", **overrides: Any) -> Path:
    """Write a tiny model with its tokenizer as a Hugging Face folder."""
    make_model(kind, **overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_sae(
    folder: Path,
    d_in: int = HIDDEN,
    layer: int = SAE_LAYER,
    metadata: dict[str, Any] | None = None,
    **config: object,
) -> Path:
    """Write a random JumpReLU SAE in sae-lens' disk format."""
    if metadata is None:
        metadata = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    weights = {
        "W_enc": torch.randn(d_in, D_SAE, generator=generator) / d_in**0.5,
        "b_enc": 0.1 * torch.randn(D_SAE, generator=generator),
        "W_dec": torch.randn(D_SAE, d_in, generator=generator) / D_SAE**0.5,
        "b_dec": 0.1 * torch.randn(d_in, generator=generator),
        "threshold": torch.rand(D_SAE, generator=generator),
    }
    if config.get("architecture", "jumprelu") != "jumprelu":
        del weights["threshold"]
    save_file(weights, folder / "sae_weights.safetensors")
    values = {
        "architecture": "jumprelu", "d_in": d_in, "d_sae": D_SAE, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", **metadata}, **config,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(values))
    return folder


def fit_sae(folder: Path, activations: torch.Tensor) -> None:
    """Give a random SAE of ``save_sae`` an encoder and decoder that explain such activations."""
    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    encoder = weights["W_enc"] / weights["W_enc"].norm(dim=0)
    pre_acts = activations @ encoder
    threshold = torch.quantile(pre_acts, 0.7, dim=0).clamp_min(0)
    decoder, rest = fit_decoder(pre_acts * (pre_acts > threshold), activations, ridge=0.01)
    fitted = {"W_enc": encoder, "b_enc": rest @ encoder, "threshold": threshold}
    save_file({**fitted, "W_dec": decoder, "b_dec": rest}, file)


def save_pairs(path: Path, count: int, start: int = 0) -> Path:
    """Write distinct preference pairs of varied length."""
    rows = [
        {
            "prompt": f"What is number {number}?",
            "chosen": "It is " + "the fox " * (1 + number % 4) + str(number),
            "rejected": "The dog " * (1 + number % 3) + f"says {number} or so",
        }
        for number in range(start, start + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_recipe(folder: Path, **sections: dict) -> Path:
    """Write model, SAE, data and a recipe that uses them; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "name": "tiny",
        "model": {"source": str(save_model(folder / "model"))},
        "data": {
            "train": [str(save_pairs(folder / "train.jsonl", 12))],
            "heldout": [str(save_pairs(folder / "heldout.jsonl", 6, start=100))],
            "max_length": 200,
            "shard_pairs": 5,
        },
        "sae": {
            "source": str(save_sae(folder / "sae")),
            "layer": SAE_LAYER,
            "gate": "warn",  # a random SAE explains nothing
        },
        "features": {"cache_k": 64, "tokens_k": 8, "examples": 4},
        "train": {"lr": 1e-3, "warmup_steps": 1, "batch_size": 4, "k": 8},
        "evaluation": {"prompts": 2, "max_new_tokens": 6, "bootstrap": 200},
        "resources": {"tokens_per_batch": 256, "threads": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}  # pyright: ignore[reportGeneralTypeIssues]
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(values))
    return path
