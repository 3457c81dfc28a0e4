"""Training's checkpoints on their way to the store, in the background of training."""

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fpo_core.errors import FPOError
from fpo_core.training.checkpoint import is_complete, read_meta
from storage.checkpoints import Saved
from storage.errors import StoreError
from storage.writer import ArtifactWriter

log = logging.getLogger("fpo.stage")
MOST_LOST = 2


class CheckpointKeeper:
    """Keeps the newest checkpoints of a run in the store.

    One that cannot be stored stays on this machine, is said, and training goes on; it ends when two
    in a row could not. Leaving the context waits for what is on its way.

    Args:
        writer: of the policy in the making.
        count: checkpoints to keep.
    """

    def __init__(self, writer: ArtifactWriter, count: int) -> None:
        self._checkpoints, self._count = writer.checkpoints(), count
        self.local = writer.scratch() / "checkpoints"  # where the workers write them
        self._lost = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._waiting: list[Future[None]] = []

    def __enter__(self) -> "CheckpointKeeper":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self._raise_what_failed()

    def newest(self) -> Saved | None:
        """The checkpoint to go on from; what an earlier run left on this machine goes in first.

        Raises:
            StoreError: the store cannot take that; it stays here.
        """
        for folder in sorted(self.local.glob("step-*")):
            if is_complete(folder):
                self._store(folder)
        shutil.rmtree(self.local, ignore_errors=True)
        return self._checkpoints.newest()

    def keep(self, folder: Path) -> None:
        """Store a complete checkpoint, in the background; one that still waits is passed over.

        Raises:
            FPOError: two in a row could not be stored.
        """
        self._raise_what_failed()
        if self._lost >= MOST_LOST:
            raise FPOError(
                f"{MOST_LOST} checkpoints in a row could not be stored, so training was stopped; "
                f"see the warnings above. They are kept on this machine: with the store in order, "
                f"the same command goes on from there"
            )
        for older in self._waiting:
            older.cancel()  # has not begun: this one is newer, and takes its place
        self._waiting.append(self._thread.submit(self._try_to_store, folder))

    def _try_to_store(self, folder: Path) -> None:
        try:
            self._store(folder)
            self._lost = 0
        except (OSError, StoreError) as error:
            self._lost += 1
            log.warning("checkpoint %s could not be stored: %s", folder.name, error)

    def _store(self, folder: Path) -> None:
        self._checkpoints.put(folder.name, [folder / name for name in read_meta(folder).files])
        self._checkpoints.keep(self._count)
        for older in self.local.glob("step-*"):
            if older.name <= folder.name:
                shutil.rmtree(older, ignore_errors=True)

    def _raise_what_failed(self) -> None:
        """Raise what ended a transfer other than the store's and the disk's own errors."""
        done = [future for future in self._waiting if future.done()]
        self._waiting = [future for future in self._waiting if not future.done()]
        for future in done:
            if not future.cancelled():
                future.result()
