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

    One that cannot be kept is said and training goes on; it ends when two in a row are lost.
    Leaving the context waits for what is on its way.

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

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def newest(self) -> Saved | None:
        """The checkpoint to go on from; what a killed run left on this machine goes in first."""
        for folder in sorted(self.local.glob("step-*")):
            if is_complete(folder):
                self._store(folder)
        shutil.rmtree(self.local, ignore_errors=True)
        return self._checkpoints.newest()

    def keep(self, folder: Path) -> None:
        """Store a complete checkpoint, in the background.

        Raises:
            FPOError: two in a row could not be stored.
        """
        if self._lost >= MOST_LOST:
            raise FPOError(
                f"{MOST_LOST} checkpoints in a row could not be stored, so training was stopped; "
                f"see the warnings above"
            )
        self._waiting.append(self._thread.submit(self._store, folder))

    def _store(self, folder: Path) -> None:
        try:
            self._checkpoints.put(folder.name, [folder / name for name in read_meta(folder).files])
            self._checkpoints.keep(self._count)
            self._lost = 0
            log.debug("checkpoint %s stored", folder.name)
        except (OSError, StoreError) as error:
            self._lost += 1
            log.warning("checkpoint %s could not be stored: %s", folder.name, error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
