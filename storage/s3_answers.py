"""Recognise S3 by its answers, before any of them is believed."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from storage.s3_errors import NotS3Error, printable

_LISTS = {"ListObjectsV2": b"<ListBucketResult", "ListMultipartUploads": b"<ListMultipartUploads"}
_REDIRECTS = {301, 302, 303, 307, 308}
_HEAD_BYTES = 2000  # of an answer, in which its first element is


def check_answer(operation: str, answer: Mapping[str, Any]) -> None:
    """Check that lists, redirects and missing objects are worded as S3 words them.

    Failures of a server (5xx) pass: proxies word them as they like, and they are tried again.

    Args:
        operation: such as ListObjectsV2.
        answer: status_code, headers and body, as botocore has them before it parses them.

    Raises:
        NotS3Error: saying what answered.
    """
    status, body = answer["status_code"], answer["body"]
    if status >= 500 or operation.startswith("Head") or not isinstance(body, bytes):
        return
    begin = body[:_HEAD_BYTES]
    if status < 300:
        is_s3 = _LISTS.get(operation, b"") in begin or b"<Error" in begin
    elif operation in _LISTS or status in _REDIRECTS:
        is_s3 = b"<Error" in begin
    else:
        # A proxy may refuse a write in its own words, but what is missing S3 alone knows.
        is_s3 = status != 404 or not body or b"<Error" in begin
    if not is_s3:
        raise NotS3Error(_in_words(status, answer["headers"]))


def _in_words(status: int, headers: Mapping[str, str]) -> str:
    target = urlsplit(headers.get("location", "")) if status in _REDIRECTS else None
    if target is not None and target.netloc:
        # The host alone: a path or a query can hold secrets.
        return printable(f"{status}, a redirect to {target.hostname}")
    kind = headers.get("content-type", "").partition(";")[0]
    return printable(f"{status} {kind}".strip())
