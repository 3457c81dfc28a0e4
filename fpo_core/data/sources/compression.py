"""Reading a file's bytes, with gzip and Zstandard taken off as they are read."""

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fpo_core.data.sources.row import DataFile
from fpo_core.errors import FPOError

SUFFIXES = (".gz", ".zst")
BLOCK = 1 << 18
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by how a file begins


@contextmanager
def open_bytes(file: DataFile) -> Iterator[io.BufferedReader]:
    """Open a file for reading, decompressed.

    The file's first bytes decide the codec, so that a wrong suffix does no harm.

    Args:
        file: the file to read.

    Yields:
        A stream that raises an FPOError where the file is damaged.

    Raises:
        FPOError: the file cannot be opened.
    """
    raw: Any = _Guarded(file)
    with io.BufferedReader(raw, BLOCK) as stream:
        yield stream


@contextmanager
def open_seekable(file: DataFile) -> Iterator[Path | IO[bytes]]:
    """Give a file's decompressed content in a form that pyarrow can seek in.

    Args:
        file: the file to read.

    Yields:
        The file's own path, or an unnamed temporary file with the decompressed content.

    Raises:
        FPOError: the file cannot be read.
    """
    if codec_of(file) is None:
        yield file.path
        return
    with open_bytes(file) as stream, tempfile.TemporaryFile() as plain:
        shutil.copyfileobj(stream, plain, BLOCK)
        plain.seek(0)
        yield plain


def codec_of(file: DataFile) -> str | None:
    """Return the codec a file is compressed with, None for a plain file.

    Args:
        file: the file to look at.

    Raises:
        FPOError: the file cannot be opened.
    """
    try:
        with file.path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise _unreadable(file, error) from error
    return next((name for magic, name in _CODECS.items() if start.startswith(magic)), None)


class _Guarded(io.RawIOBase):
    """The decompressed bytes; faults of the file come as FPOErrors that name it."""

    def __init__(self, file: DataFile) -> None:
        import pyarrow as pa

        self._file = file
        self._codec = codec_of(file)
        try:
            self._stream: Any = file.path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(file, error) from error
        if self._codec:
            self._stream = pa.CompressedInputStream(self._stream, self._codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            if self._codec is None:
                raise _unreadable(self._file, error) from error
            raise FPOError(
                f"{self._file.name}: the {self._codec} data is damaged or cut off ({error}). "
                f"Fetch or write the file again"
            ) from error
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _unreadable(file: DataFile, error: OSError) -> FPOError:
    return FPOError(f"data file {file.name!r} cannot be read ({error.strerror or error})")
