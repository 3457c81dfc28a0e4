"""A store in an S3 bucket, through boto3: conditional writes, leases, a read cache."""

import datetime as dt
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa
from botocore.exceptions import ClientError

from storage.backend import (
    BytesDone,
    Entry,
    FileRecord,
    Hold,
    always,
    check_key,
    check_prefix,
    in_parallel,
    not_shown,
)
from storage.cache import ReadCache
from storage.lease import lease
from storage.s3_bucket import ATTEMPTS, Bucket, again, blocks
from storage.s3_client import S3Options
from storage.s3_conditions import ConditionalWrites
from storage.s3_errors import (
    BrokenAnswerError,
    NotS3Error,
    code_of,
    is_missing,
)
from storage.s3_files import S3Files
from storage.s3_object import ObjectReader


class S3Backend:
    """Objects below a prefix of a bucket.

    Args:
        bucket: its name.
        prefix: of all keys, without slashes at its ends; may be empty.
        options: where the service is.
        cache: local copies of files.
        scratch: a local folder below which this store's work in progress goes.
    """

    parallel_reads = 16

    def __init__(
        self, bucket: str, prefix: str, options: S3Options, cache: ReadCache, scratch: Path
    ) -> None:
        self._prefix = f"{prefix}/" if prefix else ""
        self._bucket = Bucket(bucket, self._prefix, options)
        # Two stores never share work in progress, in whatever service they are.
        place = f"{self._bucket.endpoint} {bucket} {prefix}"
        self.scratch = scratch / hashlib.sha256(place.encode()).hexdigest()[:12]
        self._files = S3Files(self._bucket)
        self._conditions = ConditionalWrites(self._bucket)
        self._cache = cache

    def _key(self, key: str) -> str:
        return self._prefix + check_key(key)

    @property
    def place(self) -> dict[str, str | None]:
        """Endpoint and region, as a recipe's ``store`` section names them."""
        return {"endpoint": self._bucket.endpoint, "region": self._bucket.region}

    def read(self, key: str) -> bytes:
        """See Backend."""
        found = self.read_with_etag(key)
        if found is None:
            raise KeyError(key)
        return found[0]

    def read_with_etag(self, key: str) -> tuple[bytes, str] | None:
        """See Backend. The body is checked against the checksum that the service keeps of it."""
        name = self._key(key)
        with self._bucket.in_words():
            try:
                return again(lambda: self._read(name))
            except ClientError as error:
                if is_missing(error):
                    return None
                raise

    def _read(self, name: str) -> tuple[bytes, str]:
        answer = self._bucket.client.get_object(
            Bucket=self._bucket.name, Key=name, ChecksumMode="ENABLED"
        )
        data, etag = b"".join(blocks(answer)), answer.get("ETag")
        if not etag:
            raise NotS3Error("an object without an ETag")
        if "ChecksumSHA256" not in answer and _is_md5(answer) and etag.strip('"') != _md5(data):
            raise BrokenAnswerError("the body is not what its ETag says")
        return data, etag

    def create(self, key: str, data: bytes) -> bool:
        """See Backend."""
        return self._conditions.create(self._key(key), data)

    def replace(self, key: str, data: bytes, expected_etag: str | None) -> bool:
        """See Backend."""
        if expected_etag is None:
            return self.create(key, data)
        return self._conditions.replace(self._key(key), data, expected_etag)

    def check_writable(self, key: str) -> None:
        """See Backend. Both conditions are tried, as a run relies on them."""
        self._conditions.check(self._key(key))

    def put(self, key: str, data: bytes) -> None:
        """See Backend."""
        name = self._key(key)
        with self._bucket.in_words():
            self._bucket.client.put_object(Bucket=self._bucket.name, Key=name, Body=data)

    def put_file(
        self,
        key: str,
        path: Path,
        on_bytes: BytesDone = not_shown,
        still_ours: Callable[[], None] = always,
    ) -> FileRecord:
        """See Backend. In parallel parts where it is large."""
        with self._bucket.guarded(self._key(key), still_ours):
            record = self._files.upload(self._key(key), path, on_bytes)
        path.unlink()
        return record

    def fetch(self, key: str, record: FileRecord, on_bytes: BytesDone = not_shown) -> Path:
        """See Backend. From the read cache, or into it."""
        name = self._key(key)
        return self._cache.get(
            record, lambda target: self._files.download(name, record, target, on_bytes)
        )

    def open(self, key: str, record: FileRecord) -> pa.NativeFile:
        """See Backend. From the read cache where it is there; else what is read is fetched."""
        cached = self._cache.opened(record)
        if cached is not None:
            return cached
        return pa.PythonFile(ObjectReader(self._bucket, self._key(key), record.bytes), mode="r")

    def is_here(self, key: str, record: FileRecord) -> bool:  # noqa: ARG002 (a folder has keys)
        """See Backend. In the read cache, which goes by content."""
        cached = self._cache.opened(record)
        if cached is not None:
            cached.close()
        return cached is not None

    def copy_to(self, key: str, record: FileRecord, path: Path) -> None:
        """See Backend. Past the read cache."""
        self._files.download(self._key(key), record, path)

    def folder(self, key: str, files: Mapping[str, Path]) -> Path:
        """See Backend. Links into the read cache."""
        return self._cache.view(check_key(key), files)

    def damage(self, key: str, record: FileRecord) -> str | None:
        """See Backend. Streamed, past the read cache."""
        return self._files.damage(self._key(key), record)

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
                if key and not key.endswith("/"):  # a console's mark of a folder
                    yield Entry(key, item["Size"], item["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _page(self, prefix: str, token: Mapping[str, str]) -> dict[str, Any]:
        with self._bucket.in_words():
            return again(
                lambda: self._bucket.client.list_objects_v2(
                    Bucket=self._bucket.name, Prefix=self._prefix + prefix, **token
                )
            )

    def delete(self, keys: Iterable[str]) -> None:
        """See Backend. One by one: what a batch has to carry, not every service agrees on."""
        names = [self._key(key) for key in keys]
        with self._bucket.in_words():
            in_parallel(
                self,
                lambda name: self._bucket.client.delete_object(Bucket=self._bucket.name, Key=name),
                names,
            )

    def hold(
        self, name: str, on_wait: Callable[[], None] | None
    ) -> AbstractContextManager[Hold | None]:
        """See Backend. By a lease, as S3 has no locks."""
        return lease(self, f"leases/{check_key(name)}.json", on_wait)

    def sweep(self, prefix: str, older_than: float) -> int:
        """See Backend. Multipart uploads that were never completed.

        Nothing where the credentials may not list uploads, or the service has no such list: the
        bucket's own life-cycle rule has to remove them then.
        """
        before = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=older_than)
        full, removed = self._prefix + check_prefix(prefix), 0
        with self._bucket.in_words():
            # Until none is left, as a listing that is damaged on its way is not noticed.
            for _ in range(ATTEMPTS):
                uploads = [upload for upload in self._uploads(full) if upload[2] <= before]
                if not uploads:
                    break
                removed += sum(self._abort(name, upload_id) for name, upload_id, _ in uploads)
        return removed

    def _uploads(self, prefix: str) -> Sequence[tuple[str, str, dt.datetime]]:
        """Name, id and begin of unfinished uploads."""
        pages = self._bucket.client.get_paginator("list_multipart_uploads")
        try:
            return again(
                lambda: [
                    (upload["Key"], upload["UploadId"], upload["Initiated"])
                    for page in pages.paginate(Bucket=self._bucket.name, Prefix=prefix)
                    for upload in page.get("Uploads", ())
                ]
            )
        except ClientError as error:
            if code_of(error) in ("AccessDenied", "NotImplemented", "MethodNotAllowed"):
                return ()
            raise

    def _abort(self, name: str, upload_id: str) -> bool:
        try:
            self._bucket.client.abort_multipart_upload(
                Bucket=self._bucket.name, Key=name, UploadId=upload_id
            )
        except ClientError as error:
            if code_of(error) == "NoSuchUpload":
                return False  # somebody else was first
            raise
        return True


def _is_md5(answer: Mapping[str, Any]) -> bool:
    """Whether the ETag is the content's MD5: an object in parts or under KMS has another."""
    encrypted = answer.get("SSECustomerAlgorithm") or "kms" in answer.get(
        "ServerSideEncryption", ""
    )
    return len(answer["ETag"].strip('"')) == 32 and not encrypted


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
