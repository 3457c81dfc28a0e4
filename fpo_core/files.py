"""File modes that follow the umask, whatever library wrote the file.

safetensors writes files that only their owner can read, and `tempfile` makes such folders. In a
shared place a colleague could not read them.
"""

import os
import uuid
from pathlib import Path


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and all that is in it, the modes that the umask asks for.

    Args:
        path: an existing file or folder, in a folder that can be written.
    """
    # Asking for the umask itself would change it for other threads.
    probe = path.parent / f".umask-{uuid.uuid4().hex}"
    probe.mkdir()
    try:
        inner = probe / "file"
        inner.touch()
        file_mode = inner.stat().st_mode & 0o777
        folder_mode = probe.stat().st_mode & 0o777
        inner.unlink()
    finally:
        probe.rmdir()
    every = [path, *path.rglob("*")] if path.is_dir() else [path]
    for each in every:
        if not each.is_symlink():
            os.chmod(each, folder_mode if each.is_dir() else file_mode)
