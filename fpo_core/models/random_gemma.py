"""A tiny Gemma-2 with random weights, its tokenizer and an SAE, for the recipe ``gemma2-tiny``.

Everything is of the real kind and in the real file formats, so that a run takes the way of
``gemma2b`` without its files: soft-capping, sliding windows, tied embeddings, Gemma's tokenizer
class, Gemma Scope's ``params.npz``. The weights are noise: what a run learns says nothing.
"""

import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpo_core.data.tokenize import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.models.hooks import resid_post
from fpo_core.recipe.load import SHIPPED
from fpo_core.sae.gemma_scope import PARAMS_FILE

TEXT = SHIPPED / "data" / "quickstart" / "train.jsonl"
TOKENS = 2048  # the tokenizer's; a vocabulary may be larger, as embeddings often are
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # Gemma's, with Gemma's ids 0 to 4
HIDDEN, LAYERS = 64, 4
WINDOW = 64  # tokens of the rows that the SAE's thresholds are set on
SAE_LAYER, D_SAE, L0 = 2, 1024, 20
SAE_PLACE = f"gemma-scope-tiny-pt-res/layer_{SAE_LAYER}/width_1k/average_l0_{L0}"


def make_tiny_gemma(folder: Path, vocabulary: int = TOKENS, seed: int = 0) -> None:
    """Make ``model/`` and the SAE's folder; ``folder`` appears whole or not at all.

    Args:
        folder: is made; it may be there when it is empty.
        vocabulary: the model's, in tokens; Gemma-2's is 256,000.
        seed: of the weights; the same seed gives the same files on one machine.

    Raises:
        FPOError: the folder holds something, or the vocabulary is smaller than the tokenizer's.
    """
    if vocabulary < TOKENS:
        raise FPOError(f"--vocabulary {vocabulary}: the tokenizer has {TOKENS} tokens; give more")
    folder = folder.expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FPOError(f"{folder} is there already; remove it, or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        tokenizer = train_tokenizer()
        model = random_model(vocabulary, seed)
        model.save_pretrained(scratch / "model")
        tokenizer.save_pretrained(scratch / "model")
        save_params(scratch / SAE_PLACE, random_sae(_activations(model, tokenizer), seed))
        scratch.chmod(0o755)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def random_model(vocabulary: int, seed: int) -> Any:
    """A Gemma-2 of four layers, every second with a window that the quickstart's pairs exceed."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        query_pre_attn_scalar=16, sliding_window=32, max_position_embeddings=8192,
        tie_word_embeddings=True,
        # Gemma-2's own 0.02 is for its width: at 64 the logits would all be the same. Its caps, 50
        # and 30, are for logits of a trained model: these would not feel them.
        initializer_range=0.2, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(config).eval()


def train_tokenizer() -> Any:
    """Gemma's kind of tokenizer (BPE with byte fallback, BOS in front), on the quickstart's text.

    As every base Gemma's, it has no chat template.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    learned: Any = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=[*SPECIAL, *bytes_], show_progress=False
    )
    learned.train_from_iterator(itertools.chain.from_iterable(_pairs()), trainer)
    state = json.loads(learned.to_str())["model"]
    merges: Any = [tuple(merge) for merge in state["merges"]]
    return GemmaTokenizer(vocab=state["vocab"], merges=merges, add_bos_token=True)


def random_sae(activations: Tensor, seed: int) -> dict[str, np.ndarray]:
    """A random JumpReLU SAE of which ``L0`` features a token fire on such activations.

    Args:
        activations: [N, d_in] of the model it is for.
        seed: of its directions.

    Returns:
        The arrays of Gemma Scope's format.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(activations.shape[1], D_SAE, generator=generator)
    encoder = directions / directions.norm(dim=0)
    mean = activations.mean(0)
    bias = -mean @ encoder  # b_dec is not subtracted from the input: its share is in b_enc
    threshold = torch.quantile(activations @ encoder + bias, 1 - L0 / D_SAE, dim=0)
    arrays = {
        "W_enc": encoder, "b_enc": bias, "threshold": threshold.clamp_min(0.0),
        "W_dec": encoder.T.contiguous(), "b_dec": mean,
    }  # fmt: skip
    return {name: array.numpy() for name, array in arrays.items()}


def save_params(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an SAE as Gemma Scope does."""
    folder.mkdir(parents=True)
    np.savez(folder / PARAMS_FILE, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]


def _activations(model: Any, tokenizer: Any) -> Tensor:
    """The residual stream [N, d_model] where the SAE reads, in answers of the quickstart's."""
    chat = ChatFormat(tokenizer, "halos")
    texts = [chat.full_text(({"role": "user", "content": p},), c) for p, c, _ in _pairs()]
    rows = [ids[:WINDOW] for ids in chat.ids(texts) if len(ids) >= WINDOW]
    # A prompt has some 30 tokens: the second half of a row is of the answer.
    read = resid_post(model, SAE_LAYER, torch.tensor(rows))[:, WINDOW // 2 :]
    return read.flatten(0, 1)


def _pairs() -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer of the quickstart's training pairs."""
    rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
