"""Reading a safetensors file of an SAE, with what is wrong with it said."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fpo_core.errors import FPOError

if TYPE_CHECKING:
    from torch import Tensor


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors, from the file's header: no weights are read.

    Raises:
        FPOError: missing or damaged.
    """
    from safetensors import safe_open

    with _damage_told(file), safe_open(file, framework="numpy") as tensors:
        names = tensors.keys()  # it is no mapping, for all that
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}


def read_tensors(file: Path) -> "dict[str, Tensor]":
    """The tensors in float32.

    Raises:
        FPOError: missing or damaged.
    """
    from safetensors.torch import load_file

    with _damage_told(file):
        return as_float32(load_file(file), file)


def as_float32(state: "dict[str, Tensor]", file: Path) -> "dict[str, Tensor]":
    """Return tensors in float32.

    Args:
        state: the tensors by name.
        file: theirs, for messages.

    Raises:
        FPOError: one is of another type than a plain float, so a factor on it may be missing.
    """
    import torch

    plain = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    for name, value in state.items():
        if value.dtype not in plain:
            raise FPOError(
                f"SAE {file.parent}: {name} in {file.name} is {value.dtype}, which is quantized "
                f"or damaged. Expected float32, float16 or bfloat16. Save the SAE in one of these"
            )
    return {name: value.float() for name, value in state.items()}


@contextmanager
def _damage_told(file: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (FileNotFoundError, SafetensorError) as error:
        raise FPOError(
            f"SAE {file.parent}: {file.name} is missing or damaged ({error}). Fetch the file again"
        ) from error
