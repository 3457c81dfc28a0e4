"""A device that is not the CPU, for machines without one: it computes on the CPU and is strict.

A tensor "on" it wraps a CPU tensor. As on a GPU, an operation whose tensors are on two devices is
an error, and so is reading a tensor's memory (``numpy``) before it was copied to the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")  # the one name, beside cpu, that needs no driver
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OtherTensor(Tensor):
    """A tensor on the other device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OtherTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip
        wrapper.held = held
        return wrapper

    # These copy to the CPU by themselves, on a GPU too. Here torch would refuse.
    def tolist(self) -> Any:
        return self.held.tolist()

    def item(self) -> Any:
        return self.held.item()

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


@contextmanager
def other_device() -> Iterator[None]:
    """While it is open, tensors can be made on ``DEVICE`` and moved to it."""
    with _Dispatch(), _FromData():
        yield


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _FromData(TorchFunctionMode):
    """torch fills no tensor of that name with data: it is made on the CPU and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and _is_other(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


def _is_other(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    others = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    asked = kwargs.get("device")
    if func not in _COPIES and others:
        # A number in a tensor goes with any device; nothing else does.
        strays = [t for t in tensors if not isinstance(t, OtherTensor) and t.dim() > 0]
        if strays:
            raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, found some on the CPU")
    made = _is_other(asked) if asked is not None else bool(others)
    if func is torch.ops.aten.copy_.default:
        made = isinstance(args[0], OtherTensor)
    if asked is not None:
        kwargs = {**kwargs, "device": "cpu"}
    inner = tree_map(lambda x: x.held if isinstance(x, OtherTensor) else x, (args, kwargs))
    if func is torch.ops.aten._to_copy.default and made != bool(others):
        out = inner[0][0].clone().to(inner[1].get("dtype") or inner[0][0].dtype)
    else:
        out = func(*inner[0], **inner[1])
    if not made:
        return out
    out = tree_map(lambda x: OtherTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if others else out
