"""Bring a stage's inputs to this machine, and show how far large transfers are."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fpo_core.progress import Progress
from storage.artifact import Artifact, shard_name
from storage.backend import BytesDone

_MB = 10**6


@contextmanager
def bytes_progress(label: str, total: int) -> Iterator[BytesDone]:
    """A progress bar in MB for a transfer of ``total`` bytes; its callback counts bytes."""
    done, shown, lock = 0, 0, threading.Lock()
    with Progress(label, total=max(1, total // _MB), unit="MB") as progress:

        def count(amount: int) -> None:
            nonlocal done, shown
            with lock:  # transfers call from several threads
                done += amount
                progress.advance(done // _MB - shown)
                shown = done // _MB

        yield count


def local_shards(artifact: Artifact, table: str = "") -> tuple[Path, ...]:
    """Local paths of a table's shards, each checked against its checksum."""
    names = [shard_name(table, shard) for shard in range(artifact.num_shards(table))]
    total = sum(artifact.files[name].bytes for name in names)
    with bytes_progress(f"reading {artifact.stage}", total) as done:
        return tuple(artifact.paths(names, done))


def local_folder(artifact: Artifact, name: str) -> Path:
    """A local folder of an artifact's files, each checked against its checksum."""
    inside = (file for file in artifact.files if file.startswith(f"{name}/"))
    total = sum(artifact.files[file].bytes for file in inside)
    with bytes_progress(f"reading {artifact.stage}", total) as done:
        return artifact.folder(name, done)
