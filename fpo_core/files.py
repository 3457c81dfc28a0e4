"""Files of the user's: modes that follow the umask, JSON that may be anything.

safetensors writes files that only their owner can read, and `tempfile` makes such folders. In a
shared place a colleague could not read them.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from fpo_core.errors import FPOError


def read_json_object(path: Path, of: str) -> dict[str, Any]:
    """Read a JSON object from a file that someone else wrote.

    Args:
        path: The file.
        of: Kind of thing the file belongs to, such as "model", for the error.

    Raises:
        FPOError: The file is not JSON, is nested too deeply, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise FPOError(f"{of} {str(path)!r}: the JSON is nested too deeply") from error
    except ValueError as error:
        raise FPOError(f"{of} {str(path)!r}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FPOError(f"{of} {str(path)!r}: expected a JSON object, got {type(value).__name__}")
    return value


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
