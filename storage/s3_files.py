"""Data files to and from a bucket: streamed, in parallel, verified at both ends.

What is sent is verified by the service (a sha256 header on every body and part) and once more by
asking for it afterwards; what is read is hashed as it comes, and read again where it is wrong.
"""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError

from storage.backend import BytesDone, FileRecord, not_shown
from storage.errors import FileDamaged, StoreError
from storage.local import file_damage
from storage.s3_bucket import ATTEMPTS, BLOCK_BYTES, Bucket, again, blocks
from storage.s3_errors import is_missing

PART_BYTES = 16 << 20
PARALLEL_PARTS = 8
# Up to here a file is one stream: several are read at a time, and each is hashed as it comes.
ONE_STREAM_BYTES = 128 << 20


class S3Files:
    """Transfer of whole files.

    Args:
        bucket: where they are.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._parts = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES,
            max_concurrency=PARALLEL_PARTS, io_chunksize=BLOCK_BYTES,
        )  # fmt: skip

    def upload(self, name: str, path: Path, on_bytes: BytesDone) -> FileRecord:
        """Send a file, in parallel parts where it is large.

        Args:
            name: of the object.
            path: the file.
            on_bytes: told of bytes as they go.

        Raises:
            StoreError: it cannot be sent, or did not arrive whole.
        """
        record, in_parts = _digests(path)
        with self._bucket.in_words():
            again(
                lambda: self._bucket.client.upload_file(
                    str(path), self._bucket.name, name, Callback=on_bytes,
                    ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=self._parts,
                )
            )  # fmt: skip
            reason = self._arrival_fault(name, record, in_parts)
        if reason:
            raise StoreError(f"{name} did not arrive whole at {self._bucket.endpoint}: {reason}")
        return record

    def _arrival_fault(self, name: str, record: FileRecord, in_parts: str) -> str | None:
        """Ask what arrived; where the service keeps no sha256, read all of it back."""
        head = self._bucket.client.head_object(
            Bucket=self._bucket.name, Key=name, ChecksumMode="ENABLED"
        )
        kept = head.get("ChecksumSHA256")
        if kept is None:
            return self.damage(name, record)
        if head["ContentLength"] != record.bytes:
            return f"it has {head['ContentLength']} bytes, sent were {record.bytes}"
        sent = in_parts if "-" in kept else base64.b64encode(bytes.fromhex(record.sha256)).decode()
        return None if kept == sent else "its sha256 is not that of what was sent"

    def download(
        self, name: str, record: FileRecord, target: Path, on_bytes: BytesDone = not_shown
    ) -> None:
        """Fetch an object into a file.

        Raises:
            FileDamaged: it is not what the record says, with the reason.
            StoreError: it cannot be fetched.
        """
        self._settle(lambda: self._download(name, record, target, on_bytes))

    def _download(
        self, name: str, record: FileRecord, target: Path, on_bytes: BytesDone
    ) -> str | None:
        if record.bytes <= ONE_STREAM_BYTES:
            with target.open("wb") as sink:
                return self._stream(name, record, sink, on_bytes)
        self._bucket.client.download_file(
            self._bucket.name, name, str(target), Config=self._parts, Callback=on_bytes
        )
        return file_damage(target, record)

    def damage(self, name: str, record: FileRecord) -> str | None:
        """Read an object and keep nothing of it; why it is wrong, or None."""
        try:
            self._settle(lambda: self._stream(name, record))
        except FileDamaged as error:
            return str(error)
        return None

    def _stream(
        self,
        name: str,
        record: FileRecord,
        sink: IO[bytes] | None = None,
        on_bytes: BytesDone = not_shown,
    ) -> str | None:
        """Read an object once, writing and hashing as it comes; why it is wrong, or None."""
        answer = self._bucket.client.get_object(Bucket=self._bucket.name, Key=name)
        if answer["ContentLength"] != record.bytes:
            return f"it has {answer['ContentLength']} bytes, written were {record.bytes}"
        digest = hashlib.sha256()
        for block in blocks(answer):
            digest.update(block)
            if sink is not None:
                sink.write(block)
            on_bytes(len(block))
        found = digest.hexdigest()
        if found != record.sha256:
            return f"its sha256 is {found[:12]}..., written was {record.sha256[:12]}..."
        return None

    def _settle(self, read: Callable[[], str | None]) -> None:
        """Read until the bytes are right; what is wrong twice in the same way is so at rest."""
        seen: set[str] = set()
        with self._bucket.in_words():
            for _ in range(ATTEMPTS):
                try:
                    reason = again(read)
                except ClientError as error:
                    if is_missing(error):
                        raise FileDamaged("it is missing") from None
                    raise
                if reason is None:
                    return
                if reason in seen:
                    raise FileDamaged(reason)
                seen.add(reason)
        raise FileDamaged("it arrives differently each time; something damages data on its way")


def _digests(path: Path) -> tuple[FileRecord, str]:
    """A file's record, and S3's own checksum of an object in parts: of the parts' checksums."""
    whole, parts, size = hashlib.sha256(), [], path.stat().st_size
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            whole.update(block)
            if size >= PART_BYTES:
                if (stream.tell() - len(block)) % PART_BYTES == 0:
                    parts.append(hashlib.sha256())
                parts[-1].update(block)
    of_parts = hashlib.sha256(b"".join(part.digest() for part in parts)).digest()
    in_parts = f"{base64.b64encode(of_parts).decode()}-{len(parts)}"
    return FileRecord(size, whole.hexdigest()), in_parts
