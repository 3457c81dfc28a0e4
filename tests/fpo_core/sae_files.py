"""Small SAEs in sae-lens' disk format, and what it takes to be the same as sae-lens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fpo_core.sae import coder

D_IN, D_SAE = 16, 48
WEIGHTS = {
    "standard": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "topk": ("b_enc",),
    "gated": ("b_gate", "b_mag", "r_mag"),
}  # fmt: skip


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 3


def inputs() -> torch.Tensor:
    return 3 * tensor(300, D_IN, seed=9) + 0.5


def write(folder: Path, kind: str, stored: torch.dtype = torch.float32, /, **config: Any) -> Path:
    """An SAE in sae-lens' disk format; the rows of its decoder have all lengths."""
    state = {
        "W_enc": tensor(D_IN, D_SAE),
        "W_dec": tensor(D_SAE, D_IN, seed=1),
        "b_dec": tensor(D_IN),
    }
    for seed, name in enumerate(WEIGHTS[kind]):
        state[name] = tensor(D_SAE, seed=seed + 3)
    if "threshold" in state:
        state["threshold"] = state["threshold"].abs()
    values = {"architecture": kind, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32",
              "metadata": {"sae_lens_version": "6.54.12"}, **config}  # fmt: skip
    if kind == "topk":
        values.setdefault("k", 7)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.to(stored) for name, value in state.items()},
              folder / "sae_weights.safetensors")  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(values))
    return folder


@torch.no_grad()
def same_as_sae_lens(ours, theirs, x: torch.Tensor) -> None:
    """Encode, sparse or not, and decode to 1e-6 of the largest value; some fire, and not all."""
    acts = theirs.encode(x)
    assert 0 < int((acts > 0).sum()) < acts.numel()
    close(ours.encode(x), acts)
    close(ours.decode(acts, x), theirs.decode(acts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coder, "CHUNK_ELEMENTS", 70 * D_SAE)  # more than one chunk
        token, feature, value = ours.active(x)
    assert torch.equal(torch.tensor(token), acts.nonzero()[:, 0])
    assert torch.equal(torch.tensor(feature), acts.nonzero()[:, 1])
    close(torch.tensor(value), acts[token, feature])


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def columns_are_exact(ours, x: torch.Tensor) -> None:
    """Some columns, with their gradient, against autograd through the whole encode."""
    columns = torch.tensor([3, 0, D_SAE - 1, 20])
    weights = tensor(len(x), len(columns), seed=4)
    gradients = []
    for encode in (
        lambda at: ours.encode(at)[:, columns],
        lambda at: ours.encode_columns(at, columns),
    ):
        at = x.clone().requires_grad_()
        acts = encode(at)
        (acts * weights).sum().backward()
        gradients.append((acts.detach(), at.grad))
    for whole, part in zip(*gradients, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)
    assert (gradients[0][0] > 0).any()
