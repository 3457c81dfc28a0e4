"""Keep freed memory in the process, instead of giving it back to the system after every tensor.

glibc maps each large tensor afresh and the kernel zeroes its pages again: on CPU that costs a
training step more than its arithmetic does. These settings make freed blocks reusable. Resident
memory then stays at its peak, which it would reach again at the next step anyway.
"""

import ctypes
import gc
import resource
import sys

# Constants of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Tune the allocator of this process; returns whether it is one that can be tuned (glibc)."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _TOP_PAD_BYTES),
    )  # fmt: skip
    return all(mallopt(name, value) == 1 for name, value in settings)


def release_gpu_memory() -> None:
    """Give back the GPU memory that this process keeps for nothing: other processes may need it.

    Without torch, or where it never used a GPU, this does nothing.
    """
    torch = sys.modules.get("torch")  # imported here, it would take seconds for nothing
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()  # a model's modules refer to each other
        torch.cuda.empty_cache()


def peak_memory_mb() -> float:
    """The most memory this process had so far: of torch's allocator on a GPU, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
