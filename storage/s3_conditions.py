"""Conditional writes to a bucket, and the check that a service honours them.

Leases and refs rely on both conditions. A service or a proxy that ignores one lets two runs write
over each other, and one that refuses a right ETag looks like another run that never ends.
"""

import uuid
from contextlib import suppress
from typing import NoReturn

from botocore.exceptions import ClientError

from storage.errors import StoreError
from storage.s3_bucket import Bucket
from storage.s3_errors import code_of, is_missing, is_refused_precondition

_MARK = "fpo-write"  # metadata of conditional writes, by which the writer knows its own
_NO_OBJECTS_ETAG = '"00000000000000000000000000000000"'
# Codes of a request that a service or a proxy does not take: for all it knows, for its headers.
_UNSUPPORTED = {
    "NotImplemented",
    "InvalidArgument",
    "InvalidRequest",
    "MethodNotAllowed",
    "400",
    "405",
    "501",
}


class ConditionalWrites:
    """Writes that succeed only if a condition holds.

    Args:
        bucket: where the objects are.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def create(self, name: str, data: bytes) -> bool:
        """Write a new object; False, with nothing changed, if it exists."""
        return self._write(name, data, IfNoneMatch="*")

    def replace(self, name: str, data: bytes, etag: str) -> bool:
        """Write over an object that still has the ETag; False, with nothing changed, if not."""
        return self._write(name, data, IfMatch=_strong(etag))

    def check(self, name: str) -> None:
        """Try both conditions, each where it holds and where it does not, and remove the object.

        Args:
            name: of an object that does not exist.

        Raises:
            StoreError: naming the service, the condition that it does not honour, and the remedy.
        """
        if not self.create(name, b"first"):
            self._fail("If-None-Match", "it refused `If-None-Match: *` for a new object")
        try:
            self._check_existing(name)
        except StoreError:
            with suppress(StoreError):
                self._remove(name)
            raise
        self._remove(name)

    def _check_existing(self, name: str) -> None:
        if self._is_accepted(name, b"second", "", IfNoneMatch="*"):
            self._fail("If-None-Match", "it wrote over an object despite `If-None-Match: *`")
        if self._is_accepted(name, b"third", "", IfMatch=_NO_OBJECTS_ETAG):
            self._fail("If-Match", "it wrote over an object despite another ETag")
        data, etag = self._read(name)
        if data != b"first":
            self._fail("conditions", "it refused a write and changed the object all the same")
        if not self.replace(name, b"fourth", etag):
            self._fail("If-Match", f"it refused the object's own ETag, {etag[:40]}")

    def _write(self, name: str, data: bytes, **condition: str) -> bool:
        mark = uuid.uuid4().hex
        if self._is_accepted(name, data, mark, **condition):
            return True
        # When the answer to a first try was lost, what stands there now is ours.
        return self._mark(name) == mark

    def _is_accepted(self, name: str, data: bytes, mark: str, **condition: str) -> bool:
        with self._bucket.in_words():
            try:
                self._bucket.client.put_object(
                    Bucket=self._bucket.name,
                    Key=name,
                    Body=data,
                    Metadata={_MARK: mark},
                    **condition,
                )
            except ClientError as error:
                if is_refused_precondition(error) or is_missing(error):
                    return False
                if code_of(error) in _UNSUPPORTED:
                    self._check_sha256(name, error)
                    header = "If-Match" if "IfMatch" in condition else "If-None-Match"
                    self._fail(header, f"it refused a write with that header ({code_of(error)})")
                raise
        return True

    def _check_sha256(self, name: str, error: ClientError) -> None:
        """Raise if it is the checksum's header that the service refuses, not the condition's."""
        plain = {"Bucket": self._bucket.name, "Key": f"{name}.{uuid.uuid4().hex}.tmp"}
        client = self._bucket.without_sha256()
        try:
            client.put_object(**plain, Body=b"plain")
        except ClientError:
            raise error from None  # of another reason than headers of ours
        try:
            self._bucket.client.put_object(**plain, Body=b"plain")
        except ClientError as again:
            if code_of(again) not in _UNSUPPORTED:
                raise
            raise StoreError(
                f"{self._bucket.in_full} refused a write with the header x-amz-checksum-sha256 "
                f"({code_of(error)}). Every write carries it, so that damage on the way is found. "
                f"Use a service or a proxy that takes it, such as AWS S3, MinIO or SeaweedFS"
            ) from None
        finally:
            client.delete_object(**plain)

    def _read(self, name: str) -> tuple[bytes, str]:
        with self._bucket.in_words():
            answer = self._bucket.client.get_object(Bucket=self._bucket.name, Key=name)
            return answer["Body"].read(), answer.get("ETag", "")

    def _mark(self, name: str) -> str | None:
        """Return the mark of the conditional write that an object is of."""
        with self._bucket.in_words():
            try:
                head = self._bucket.client.head_object(Bucket=self._bucket.name, Key=name)
            except ClientError as error:
                if is_missing(error):
                    return None
                raise
        return head["Metadata"].get(_MARK)

    def _remove(self, name: str) -> None:
        with self._bucket.in_words():
            self._bucket.client.delete_object(Bucket=self._bucket.name, Key=name)

    def _fail(self, condition: str, reason: str) -> NoReturn:
        raise StoreError(
            f"{self._bucket.in_full} does not honour {condition}: {reason}. Without conditional "
            f"writes two runs can damage each other's work. Use a service that has them, such as "
            f"AWS S3, MinIO or SeaweedFS, without a proxy that changes headers"
        ) from None


def _strong(etag: str) -> str:
    """Return an ETag as the service wrote it: proxies make it weak or drop the quotes."""
    return '"' + etag.removeprefix("W/").strip('"') + '"'
