"""A store in an S3 bucket, through boto3: conditional writes, parallel multipart transfer.

What is sent is verified by the service (a sha256 header on every body and part) and once more by
asking for it afterwards; what is read is verified by us. Files come through a local read cache.
"""

import base64
import datetime as dt
import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, TypeVar

import tenacity
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    ClientError,
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from storage.backend import BytesDone, Entry, FileRecord, Hold, check_key, check_prefix, not_shown
from storage.cache import ReadCache
from storage.errors import FileDamaged, StoreError
from storage.lease import lease
from storage.local import file_damage
from storage.s3_client import S3Options, backoff, make_client
from storage.s3_errors import (
    BrokenAnswerError,
    code_of,
    is_broken,
    is_missing,
    is_refused_precondition,
    told_in_words,
)

T = TypeVar("T")
PART_BYTES = 16 << 20
PARALLEL_PARTS = 8
_BLOCK = 1 << 20
_ONE_STREAM_BYTES = 128 << 20
_DELETE_BATCH = 1000
_ATTEMPTS = 8
_MARK = "fpo-write"  # metadata of conditional writes, by which the writer knows its own
_FIRST_ATTEMPTS = 3

# What reading a body can raise; botocore tries again only as long as no answer has begun.
_BROKEN_BODY = (
    IncompleteReadError, ReadTimeoutError, ResponseStreamingError, FlexibleChecksumError,
    ConnectionError, TimeoutError,
)  # fmt: skip


class S3Backend:
    """Objects below a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: of all keys, without slashes at its ends; may be empty.
        options: where the service is.
        cache: local copies of files.
        scratch: a local folder for work in progress.
    """

    parallel_reads = 16

    def __init__(
        self, bucket: str, prefix: str, options: S3Options, cache: ReadCache, scratch: Path
    ) -> None:
        self.bucket, self.scratch = bucket, scratch
        self._prefix = f"{prefix}/" if prefix else ""
        self._cache, self._options = cache, options
        self._patient = make_client(options)
        self._endpoint = self._patient.meta.endpoint_url
        self._met = False
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES,
            max_concurrency=PARALLEL_PARTS, io_chunksize=_BLOCK,
        )  # fmt: skip

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _in_words(self) -> AbstractContextManager[None]:
        return told_in_words(self.bucket, self._endpoint)

    @property
    def _client(self) -> Any:
        """The client, after a first contact that is quick to say what is set up wrongly.

        Later a service may be away for a minute: then patience serves better than an error.
        """
        if not self._met:
            attempts = min(_FIRST_ATTEMPTS, self._options.max_attempts)
            quick = make_client(self._options._replace(max_attempts=attempts))
            quick.list_objects_v2(Bucket=self.bucket, Prefix=self._prefix, MaxKeys=1)
            self._met = True
        return self._patient

    def read(self, key: str) -> bytes:
        """See Backend."""
        found = self.read_with_etag(key)
        if found is None:
            raise KeyError(key)
        return found[0]

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """See Backend. The body is checked against the checksum that the service keeps of it."""
        name = self._key(key)
        with self._in_words():
            try:
                return _again(lambda: self._read(name))
            except ClientError as error:
                if is_missing(error):
                    return None
                raise

    def _read(self, name: str) -> tuple[bytes, str]:
        answer = self._client.get_object(Bucket=self.bucket, Key=name, ChecksumMode="ENABLED")
        data, etag = b"".join(_blocks(answer)), answer["ETag"]
        if "ChecksumSHA256" not in answer and _is_md5(etag) and etag.strip('"') != _md5(data):
            raise BrokenAnswerError("the body is not what its ETag says")
        return data, etag

    def create(self, key: str, data: bytes) -> bool:
        """See Backend."""
        return self._conditional_put(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """See Backend."""
        if expected_etag is None:
            return self.create(key, data)
        return self._conditional_put(key, data, IfMatch=expected_etag)

    def _conditional_put(self, key: str, data: bytes, **condition: str) -> bool:
        name, mark = self._key(key), uuid.uuid4().hex
        with self._in_words():
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=name, Body=data, Metadata={_MARK: mark}, **condition
                )
            except ClientError as error:
                if is_refused_precondition(error) or is_missing(error):
                    # When the answer to a first try was lost, what stands there now is ours.
                    return self._mark(name) == mark
                if code_of(error) in ("NotImplemented", "501"):
                    raise StoreError(
                        f"the service at {self._endpoint} has no conditional writes (If-Match, "
                        f"If-None-Match), without which two runs can damage each other's work; "
                        f"use one that has them (AWS S3, MinIO, SeaweedFS, Ceph, R2)"
                    ) from None
                raise
        return True

    def _mark(self, name: str) -> str | None:
        """Which conditional write an object is of."""
        try:
            head = self._client.head_object(Bucket=self.bucket, Key=name)
        except ClientError as error:
            if is_missing(error):
                return None
            raise
        return head["Metadata"].get(_MARK)

    def put(self, key: str, data: bytes) -> None:
        """See Backend."""
        name = self._key(key)
        with self._in_words():
            self._client.put_object(Bucket=self.bucket, Key=name, Body=data)

    def put_file(self, key: str, path: Path, on_bytes: BytesDone = not_shown) -> FileRecord:
        """See Backend. In parallel parts where it is large."""
        name = self._key(key)
        record = _record(path)
        with self._in_words():
            _again(
                lambda: self._client.upload_file(
                    str(path), self.bucket, name, ExtraArgs={"ChecksumAlgorithm": "SHA256"},
                    Config=self._transfer, Callback=on_bytes,
                )
            )  # fmt: skip
            self._confirm(key, name, record)
        path.unlink()
        return record

    def _confirm(self, key: str, name: str, record: FileRecord) -> None:
        """Ask what arrived; where the service keeps no sha256, read all of it back."""
        head = self._client.head_object(Bucket=self.bucket, Key=name, ChecksumMode="ENABLED")
        kept = head.get("ChecksumSHA256")
        if kept is None:
            reason = self.damage(key, record)
        elif head["ContentLength"] != record.bytes:
            reason = f"it has {head['ContentLength']} bytes, sent were {record.bytes}"
        elif "-" not in kept and base64.b64decode(kept).hex() != record.sha256:
            reason = "its sha256 is not that of what was sent"
        else:
            reason = None  # of a multipart object each part was verified as it came
        if reason:
            raise StoreError(f"{key} did not arrive whole at {self._endpoint}: {reason}")

    def fetch(self, key: str, record: FileRecord, on_bytes: BytesDone = not_shown) -> Path:
        """See Backend. From the read cache, or into it."""
        name = self._key(key)
        return self._cache.get(
            record, lambda target: self._download(name, record, target, on_bytes)
        )

    def copy_to(self, key: str, record: FileRecord, path: Path) -> None:
        """See Backend. Past the read cache."""
        self._download(self._key(key), record, path, not_shown)

    def _download(
        self, name: str, record: FileRecord, target: Path, on_bytes: BytesDone
    ) -> None:  # fmt: skip
        with self._in_words():
            try:
                _settled(lambda: self._download_once(name, record, target, on_bytes))
            except ClientError as error:
                if is_missing(error):
                    raise FileDamaged("it is missing") from None
                raise

    def _download_once(
        self, name: str, record: FileRecord, target: Path, on_bytes: BytesDone
    ) -> str | None:  # fmt: skip
        if record.bytes <= _ONE_STREAM_BYTES:  # several such files are read at a time
            with target.open("wb") as sink:
                return self._stream(name, record, sink, on_bytes)
        self._client.download_file(
            self.bucket, name, str(target), Config=self._transfer, Callback=on_bytes
        )
        return file_damage(target, record)

    def folder(self, key: str, files: Mapping[str, Path]) -> Path:
        """See Backend. Links into the read cache."""
        return self._cache.view(check_key(key), files)

    def damage(self, key: str, record: FileRecord) -> str | None:
        """See Backend. Streamed, past the read cache."""
        name = self._key(key)
        with self._in_words():
            try:
                _settled(lambda: self._stream(name, record))
            except FileDamaged as error:
                return str(error)
            except ClientError as error:
                if is_missing(error):
                    return "it is missing"
                raise
        return None

    def _stream(
        self,
        name: str,
        record: FileRecord,
        sink: IO[bytes] | None = None,
        on_bytes: BytesDone = not_shown,
    ) -> str | None:
        """Read an object once, writing and hashing as it comes; why it is wrong, or None."""
        answer = self._client.get_object(Bucket=self.bucket, Key=name)
        if answer["ContentLength"] != record.bytes:
            return f"it has {answer['ContentLength']} bytes, written were {record.bytes}"
        digest = hashlib.sha256()
        for block in _blocks(answer):
            digest.update(block)
            if sink is not None:
                sink.write(block)
            on_bytes(len(block))
        found = digest.hexdigest()
        if found != record.sha256:
            return f"its sha256 is {found[:12]}..., written was {record.sha256[:12]}..."
        return None

    def intact(self, records: Mapping[str, FileRecord]) -> set[str]:
        """See Backend. By size: every object was verified when it arrived, before its receipt."""
        folders = {key.rpartition("/")[0] + "/" for key in records}
        sizes = {entry.key: entry.size for folder in folders for entry in self.list(folder)}
        return {key for key, record in records.items() if sizes.get(key) == record.bytes}

    def list(self, prefix: str) -> Iterator[Entry]:
        """See Backend."""
        token: dict[str, str] = {}
        while True:
            page = self._page(check_prefix(prefix), token)
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self._prefix)
                yield Entry(key, item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, token: Mapping[str, str]) -> dict[str, Any]:
        with self._in_words():
            return _again(
                lambda: self._client.list_objects_v2(
                    Bucket=self.bucket, Prefix=self._prefix + prefix, **token
                )
            )

    def delete(self, keys: Iterable[str]) -> None:
        """See Backend."""
        names = [{"Key": self._key(key)} for key in keys]
        for start in range(0, len(names), _DELETE_BATCH):
            batch = {"Objects": names[start : start + _DELETE_BATCH], "Quiet": True}
            with self._in_words():
                answer = _again(
                    lambda batch=batch: self._client.delete_objects(
                        Bucket=self.bucket, Delete=batch
                    )
                )
            refused = [e for e in answer.get("Errors", ()) if e.get("Code") != "NoSuchKey"]
            if refused:
                raise StoreError(
                    f"bucket {self.bucket!r}: {len(refused)} objects could not be deleted "
                    f"({refused[0].get('Code')})"
                )

    def hold(
        self, name: str, on_wait: Callable[[], None] | None
    ) -> AbstractContextManager[Hold | None]:
        """See Backend. By a lease, as S3 has no locks."""
        return lease(self, f"leases/{check_key(name)}.json", on_wait)

    def sweep(self, prefix: str, older_than: float) -> int:
        """See Backend. Multipart uploads that were never completed."""
        before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=older_than)
        full, removed = self._prefix + check_prefix(prefix), 0
        with self._in_words():
            # Until none is left, as a listing that is damaged on its way is not noticed.
            for _ in range(_ATTEMPTS):
                uploads = [upload for upload in self._uploads(full) if upload[2] <= before]
                if not uploads:
                    break
                removed += sum(self._abort(name, upload_id) for name, upload_id, _ in uploads)
        return removed

    def _uploads(self, prefix: str) -> Sequence[tuple[str, str, dt.datetime]]:
        """Name, id and begin of unfinished uploads."""
        pages = self._client.get_paginator("list_multipart_uploads")
        return _again(
            lambda: [
                (upload["Key"], upload["UploadId"], upload["Initiated"])
                for page in pages.paginate(Bucket=self.bucket, Prefix=prefix)
                for upload in page.get("Uploads", ())
            ]
        )

    def _abort(self, name: str, upload_id: str) -> bool:
        try:
            self._client.abort_multipart_upload(Bucket=self.bucket, Key=name, UploadId=upload_id)
        except ClientError as error:
            if code_of(error) == "NoSuchUpload":
                return False  # somebody else was first
            raise
        return True


def _blocks(answer: Mapping[str, Any]) -> Iterator[bytes]:
    try:
        yield from answer["Body"].iter_chunks(_BLOCK)
    except _BROKEN_BODY as error:
        raise BrokenAnswerError(type(error).__name__) from error


def _again(call: Callable[[], T]) -> T:
    """Call until an answer arrives whole; what the service refuses is not asked again."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_broken),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=lambda state: backoff(state.attempt_number),
        reraise=True,
    )(call)


def _settled(damage: Callable[[], str | None]) -> None:
    """Read until the bytes are right; bytes that are wrong twice in the same way are so at rest.

    Raises:
        FileDamaged: with the reason.
    """
    seen: set[str] = set()
    for _ in range(_ATTEMPTS):
        reason = _again(damage)
        if reason is None:
            return
        if reason in seen:
            raise FileDamaged(reason)
        seen.add(reason)
    raise FileDamaged("it arrives differently each time; something damages data on the way here")


def _record(path: Path) -> FileRecord:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def _is_md5(etag: str) -> bool:
    return len(etag.strip('"')) == 32


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
