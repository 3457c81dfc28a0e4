"""A tiny Gemma-2 with random weights, its tokenizer and SAEs, for the recipe ``gemma2-tiny``.

Everything is of the real kind and in the real file formats, so that a run takes the way of
``gemma2b`` without its files: soft-capping, sliding windows, tied embeddings, Gemma's tokenizer
class, Gemma Scope's ``params.npz``. The weights are noise: what a run learns says nothing. But for
the SAEs' decoders, which are fitted: an SAE that explains nothing is refused, here too.
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

from fpo_core.data.conversations.model import ASSISTANT, USER, Turn
from fpo_core.data.render import ChatFormat
from fpo_core.errors import FPOError
from fpo_core.files import follow_umask
from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import activations_at
from fpo_core.recipe.load import SHIPPED
from fpo_core.sae.collect import SKIP_POSITIONS
from fpo_core.sae.gemma_scope import PARAMS_FILE

TEXT = SHIPPED / "data" / "quickstart" / "train.jsonl"
TOKENS = 2048  # the tokenizer's; a vocabulary may be larger, as embeddings often are
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")  # Gemma's, with Gemma's ids 0 to 4
HIDDEN, LAYERS = 64, 4
WINDOW = 64  # tokens of the rows that the SAEs are fitted to
SAE_LAYER, D_SAE, L0 = 2, 1024, 20
RIDGE = 0.1  # of the decoder, times the features' mean square
_IN_RELEASE = f"layer_{SAE_LAYER}/width_1k/average_l0_{L0}"
SAE_PLACE = f"gemma-scope-tiny-pt-res/{_IN_RELEASE}"
MLP_SAE_PLACE = f"gemma-scope-tiny-pt-mlp/{_IN_RELEASE}"
SAE_HOOKS = {
    SAE_PLACE: Hookpoint(SAE_LAYER),
    MLP_SAE_PLACE: Hookpoint(SAE_LAYER, "mlp_out"),
}


def make_tiny_gemma(folder: Path, vocabulary: int = TOKENS, seed: int = 0) -> None:
    """Make ``model/`` and the SAEs' folders; ``folder`` appears whole or not at all.

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
        rows = _rows(tokenizer)
        for place, hookpoint in SAE_HOOKS.items():
            # Measured, as always, without each row's first position.
            read = activations_at(model, hookpoint, rows)[:, SKIP_POSITIONS:]
            save_params(scratch / place, random_sae(read.flatten(0, 1), seed))
        follow_umask(scratch)
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

    Its encoder is random, its decoder what explains these activations best from its features.

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
    pre_acts = activations @ encoder + bias
    threshold = torch.quantile(pre_acts, 1 - L0 / D_SAE, dim=0).clamp_min(0.0)
    decoder, rest = fit_decoder(pre_acts * (pre_acts > threshold), activations)
    arrays = {
        "W_enc": encoder, "b_enc": bias, "threshold": threshold, "W_dec": decoder, "b_dec": rest,
    }  # fmt: skip
    return {name: array.numpy() for name, array in arrays.items()}


def fit_decoder(acts: Tensor, activations: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The decoder of an SAE's own features, by ridge regression.

    Args:
        acts: [N, F] features, none negative.
        activations: [N, d_in] that they are of.
        ridge: penalty, in mean squares of the features.

    Returns:
        W_dec [F, d_in] and b_dec [d_in], the intercept.
    """
    means = acts.double().mean(0), activations.double().mean(0)
    features, wanted = acts.double() - means[0], activations.double() - means[1]
    gram = features.T @ features
    gram.diagonal().add_(ridge * acts.double().square().sum(0).mean())
    decoder = torch.linalg.solve(gram, features.T @ wanted)
    return decoder.float().contiguous(), (means[1] - means[0] @ decoder).float()


def save_params(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an SAE as Gemma Scope does."""
    folder.mkdir(parents=True)
    np.savez(folder / PARAMS_FILE, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]


def _rows(tokenizer: Any) -> Tensor:
    """Answers of the quickstart's, as token ids [rows, WINDOW]."""
    chat = ChatFormat(tokenizer, "halos")
    texts = [
        chat.render([Turn(USER, prompt), Turn(ASSISTANT, chosen)]) for prompt, chosen, _ in _pairs()
    ]
    return torch.tensor([ids[:WINDOW] for ids in chat.ids(texts) if len(ids) >= WINDOW])


def _pairs() -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected answer of the quickstart's training pairs."""
    rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
