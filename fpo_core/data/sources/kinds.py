"""The kind of a data file: by its content where that is certain, else by its suffix."""

from pathlib import PurePosixPath
from typing import Literal

from fpo_core.data.sources.compression import SUFFIXES as COMPRESSED
from fpo_core.data.sources.compression import open_bytes
from fpo_core.data.sources.row import DataFile
from fpo_core.errors import FPOError

Kind = Literal["json", "csv", "tsv", "parquet", "arrow"]

BY_SUFFIX: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_HEAD = 1024
_BY_START: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",  # a stream of it
}
_LFS = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"
# The longer ones first: UTF-32's little-endian mark begins with UTF-16's.
_WIDE = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def kind_of(file: DataFile) -> Kind:
    """Find out what kind of file this is.

    Args:
        file: the file to look at.

    Raises:
        FPOError: the file is empty, a git-lfs pointer, a web page, in UTF-16, or of no known kind.
    """
    with open_bytes(file) as stream:
        head = stream.read(_HEAD)
    if not head:
        raise FPOError(f"data file {file.name!r} is empty")
    if head.startswith(_LFS):
        raise FPOError(
            f"data file {file.name!r} is a git-lfs pointer, not the data. Fetch the data with "
            f"`git lfs pull`"
        )
    for start, kind in _BY_START.items():
        if head.startswith(start):
            return kind
    by_suffix = BY_SUFFIX.get(data_suffix(file.filename))
    if by_suffix in ("parquet", "arrow"):
        return by_suffix
    _refuse_wide(head, file.name)
    text = head.removeprefix(_BOM).lstrip()
    if text[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise FPOError(
            f"data file {file.name!r} is a web page, not data. Download the file itself, not the "
            f"page that shows it"
        )
    if by_suffix:
        return by_suffix
    if not text or text.startswith((b"{", b"[")):
        return "json"
    raise FPOError(
        f"data file {file.name!r}: unknown kind; use .jsonl, .json, .csv, .tsv, .parquet or "
        f".arrow, also as .gz or .zst"
    )


def data_suffix(filename: str) -> str:
    """Return the suffix that tells a file's kind, in lower case: ``.csv`` of ``x.CSV.gz``."""
    name = PurePosixPath(filename.lower())
    return PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def not_utf8(name: str, line: int, encoding: str, fault: str) -> FPOError:
    """Return the error about a text file in another encoding.

    Args:
        name: the file's name.
        line: number of the line with the fault, from 1.
        encoding: the encoding it may have, as `iconv` names it.
        fault: what is there instead of UTF-8.
    """
    return FPOError(
        f"{name}, line {line}: not UTF-8 text ({fault}). Convert the file: "
        f"`iconv -f {encoding} -t UTF-8 OLD > NEW`"
    )


def not_utf8_byte(name: str, line: int, error: UnicodeDecodeError) -> FPOError:
    """Return the error about a byte that is not UTF-8.

    Args:
        name: the file's name.
        line: number of the line with the byte, from 1.
        error: the decoder's.
    """
    byte = error.object[error.start]
    return not_utf8(name, line, "WINDOWS-1252", f"byte 0x{byte:02x}, perhaps Latin-1")


def _refuse_wide(head: bytes, name: str) -> None:
    """Refuse UTF-16 and UTF-32, with a byte-order mark or without."""
    found = next((code for mark, code in _WIDE.items() if head.startswith(mark)), None)
    if found is None and b"\x00" in head[:4]:  # no text begins with NUL; ASCII in UTF-16 has them
        found = "UTF-16LE" if head[1] == 0 else "UTF-16BE"
    if found:
        raise not_utf8(name, 1, found, f"it is {found}")
