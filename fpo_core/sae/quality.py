"""How good an SAE is on text it has not seen.

- L0: mean number of active features a token;
- explained variance: 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2;
- dead fraction: share of features that fired on none of the tokens;
- loss recovered: how much of the next-token loss survives when the reconstruction replaces the
  activation, (zero - spliced) / (zero - original), with zero-ablation as the floor.
"""

from typing import Any

import torch
from torch import Tensor

from fpo_core.logprobs import output_head, selected_logps
from fpo_core.models.architectures import decoder_layers
from fpo_core.progress import Progress
from fpo_core.sae.coder import SparseCoder
from fpo_core.sae.collect import SKIP_POSITIONS


@torch.no_grad()
def sae_quality(
    model: Any, coder: SparseCoder, layer: int, windows: Tensor, *, windows_per_batch: int = 4
) -> dict[str, float | int]:
    """Measure an SAE on token windows.

    Args:
        model: the language model.
        coder: the SAE, on the model's device.
        layer: its decoder block.
        windows: token ids [windows, length] that were not trained on.
        windows_per_batch: windows a forward pass.
    """
    fired = torch.zeros(coder.d_sae, dtype=torch.bool, device=model.device)
    active = residual = 0.0
    count = 0
    square = 0.0
    total = torch.zeros(coder.d_in, dtype=torch.float64, device=model.device)
    losses = {"original": 0.0, "spliced": 0.0, "zero": 0.0}
    with Progress("SAE quality", total=3 * windows.numel(), unit="token") as progress:
        for part in windows.split(windows_per_batch):
            batch = part.to(model.device)
            seen: list[Tensor] = []
            losses["original"] += _loss(model, layer, batch, lambda x: seen.append(x))  # noqa: B023
            x = seen[0][:, SKIP_POSITIONS:].flatten(0, 1)
            acts = coder.encode(x)
            fired |= (acts > 0).any(0)
            active += float((acts > 0).sum())
            residual += float((x - coder.decode(acts)).double().square().sum())
            square += float(x.double().square().sum())
            total += x.double().sum(0)
            count += len(x)
            losses["spliced"] += _loss(model, layer, batch, lambda x: _splice(coder, x))
            losses["zero"] += _loss(model, layer, batch, _ablate)
            progress.advance(3 * batch.numel())
    variance = square - float(total.square().sum()) / count
    per_token = {name: value / (windows.numel() - len(windows)) for name, value in losses.items()}
    return {
        "tokens": count,
        "l0": active / count,
        "explained_variance": 1 - residual / variance,
        "dead_fraction": 1 - float(fired.float().mean()),
        "loss_original": per_token["original"],
        "loss_spliced": per_token["spliced"],
        "loss_zero_ablated": per_token["zero"],
        "loss_recovered": (per_token["zero"] - per_token["spliced"])
        / (per_token["zero"] - per_token["original"]),
    }


def _splice(coder: SparseCoder, x: Tensor) -> Tensor:
    """Replace the activations by their reconstruction, but for the attention sink."""
    spliced = coder.decode(coder.encode(x.flatten(0, 1))).view_as(x)
    return torch.cat([x[:, :SKIP_POSITIONS], spliced[:, SKIP_POSITIONS:]], 1)


def _ablate(x: Tensor) -> Tensor:
    return torch.cat([x[:, :SKIP_POSITIONS], torch.zeros_like(x[:, SKIP_POSITIONS:])], 1)


def _loss(model: Any, layer: int, batch: Tensor, edit: Any) -> float:
    """Summed next-token loss with the block's output replaced by what ``edit`` returns."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        edited = edit(value)
        if edited is None:
            return None
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        hidden = model.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    states, targets = hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
    return -float(selected_logps(states, output_head(model), targets).double().sum())
