"""Collect a model's activations on text into a file, for training an SAE.

The file is a float16 memory map [tokens, d_model]: one pass through the model, then as many
epochs as training wants, without holding anything in memory. A pass that was interrupted goes on
after the last window it finished.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import activations_at
from fpo_core.progress import Progress

# The first position of a Llama-like model carries an attention sink whose norm is hundreds of
# times the others'; responses never begin there, so the SAE is not trained on it.
SKIP_POSITIONS = 1
# Elsewhere a token whose norm is this many times the median is an attention sink.
SINK_FACTOR = 10.0


def no_sinks(x: Tensor) -> Tensor:
    """Activations [N, d] without those whose norm is an attention sink's."""
    norms = x.float().norm(dim=1)
    return x[norms <= SINK_FACTOR * norms.median()]


def collect_activations(
    model: Any, windows: Tensor, hookpoint: Hookpoint, folder: Path, *, windows_per_batch: int = 4
) -> np.memmap:
    """Activations at a place of the model on token windows.

    Args:
        model: causal LM in evaluation mode.
        windows: token ids [windows, length].
        hookpoint: where.
        folder: where the memory map and its progress mark live.
        windows_per_batch: windows a forward pass.

    Returns:
        float16 activations [windows * (length - 1), d_model], in the order of the windows.
    """
    count, length = windows.shape
    rows, d_model = length - SKIP_POSITIONS, model.get_decoder().config.hidden_size
    folder.mkdir(parents=True, exist_ok=True)
    data, mark = folder / "activations.f16", folder / "progress.json"
    shape = (count * rows, d_model)
    done = json.loads(mark.read_text())["windows"] if mark.is_file() and data.is_file() else 0
    mode = "r+" if done else "w+"
    activations = np.memmap(data, dtype=np.float16, mode=mode, shape=shape)
    with Progress(
        "activations", total=count * length, unit="token", done=done * length
    ) as progress:
        for start in range(done, count, windows_per_batch):
            batch = windows[start : start + windows_per_batch].to(model.device)
            values = activations_at(model, hookpoint, batch)[:, SKIP_POSITIONS:].reshape(
                -1, d_model
            )
            stop = start + len(batch)
            activations[start * rows : stop * rows] = values.to(torch.float16).cpu().numpy()
            if stop // windows_per_batch % 50 == 0:
                activations.flush()
                _write_mark(mark, stop)
            progress.advance(batch.numel())
    activations.flush()
    _write_mark(mark, count)
    return activations


def _write_mark(mark: Path, windows: int) -> None:
    partial = mark.with_suffix(".partial")
    partial.write_text(json.dumps({"windows": windows}))
    partial.replace(mark)
