"""Peak memory of a piece of work: of the process on a CPU, of torch's allocator on a GPU."""

import threading
from pathlib import Path


class PeakMemory:
    """The most memory while the context is open.

    Args:
        cuda: measure the GPU's allocator instead of the process.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self.start = self.peak = 0.0  # MiB at the beginning, and the most since

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            return self
        self.start = self.peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() / 2**20
            return
        self._stop.set()
        self._thread.join()

    @property
    def added(self) -> float:
        """MiB above the beginning."""
        return self.peak - self.start


def _resident() -> float:
    """MiB of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell a process's memory")
