"""Collect a model's activations on text into a file, for training an SAE.

The file is a memory map: one pass through the model, then as many epochs as training wants,
without holding anything in memory. A pass that was interrupted resumes after the last window it
finished.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fpo_core.hookpoint import Hookpoint
from fpo_core.models.hooks import activations_at
from fpo_core.progress import Progress

# The first position, BOS where the windows have one, carries an attention sink in Llama-like models
# whose norm is hundreds of times the others'. Responses never begin there, so the SAE is neither
# trained nor measured on it.
SKIP_POSITIONS = 1
# Elsewhere a token whose norm is this many times the median is an attention sink.
SINK_FACTOR = 10.0
_EXPONENT = 15  # float16 holds what is below 2 ** 15, and up to 65,504


def no_sinks(x: Tensor) -> Tensor:
    """Activations [N, d] without those whose norm is an attention sink's."""
    norms = x.float().norm(dim=1)
    return x[norms <= SINK_FACTOR * norms.median()]


class Activations:
    """Activations of N tokens in a file: float16 values, and one power of two per token.

    The power is 1 but for a token with a value of 2 ** 15 or more: a residual stream can pass
    65,504, the most that float16 holds. bfloat16 would hold it with an eighth of the precision.

    Args:
        file: is made, or extended where ``mode`` is ``r+``.
        mode: of ``np.memmap``.
        shape: (N, d_model).
    """

    def __init__(self, file: Path, mode: Literal["r+", "w+"], shape: tuple[int, int]) -> None:
        self.shape = shape
        row = np.dtype([("scale", np.float32), ("values", np.float16, shape[1:])])
        self._rows = np.memmap(file, dtype=row, mode=mode, shape=shape[:1])

    def __len__(self) -> int:
        """Number of tokens."""
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Return tokens' activations [n, d_model] in float32."""
        found = self._rows[rows]
        return found["values"].astype(np.float32) * found["scale"][:, None]

    def put(self, start: int, values: np.ndarray) -> None:
        """Write the activations [n, d_model] float32 of the tokens from ``start`` on."""
        _, exponents = np.frexp(np.abs(values).max(axis=1))
        scale = np.ldexp(np.float32(1), np.maximum(exponents - _EXPONENT, 0))
        rows = self._rows[start : start + len(values)]
        rows["scale"], rows["values"] = scale, values / scale[:, None]

    def flush(self) -> None:
        """Write to the disk what is in memory."""
        self._rows.flush()


def collect_activations(
    model: Any, windows: Tensor, hookpoint: Hookpoint, folder: Path, *, windows_per_batch: int = 4
) -> Activations:
    """Activations at a place of the model on token windows.

    Args:
        model: causal LM in evaluation mode.
        windows: token ids [windows, length].
        hookpoint: where.
        folder: where the memory map and its progress mark live.
        windows_per_batch: windows a forward pass.

    Returns:
        Activations [windows * (length - 1), d_model], in the order of the windows.
    """
    count, length = windows.shape
    rows, d_model = length - SKIP_POSITIONS, model.get_decoder().config.hidden_size
    folder.mkdir(parents=True, exist_ok=True)
    data, mark = folder / "activations.rows", folder / "progress.json"
    shape = (count * rows, d_model)
    done = json.loads(mark.read_text())["windows"] if mark.is_file() and data.is_file() else 0
    activations = Activations(data, "r+" if done else "w+", shape)
    with Progress(
        "activations", total=count * length, unit="token", done=done * length
    ) as progress:
        for start in range(done, count, windows_per_batch):
            batch = windows[start : start + windows_per_batch].to(model.device)
            values = activations_at(model, hookpoint, batch)[:, SKIP_POSITIONS:].reshape(
                -1, d_model
            )
            stop = start + len(batch)
            activations.put(start * rows, values.float().cpu().numpy())
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
