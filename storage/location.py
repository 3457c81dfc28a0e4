"""Open a store by its URL: a folder, ``file:///...`` or ``s3://bucket/prefix``.

Backends are imported when they are opened: boto3 and pyarrow take their time, and ``fpo --help``
needs neither.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from storage.backend import check_key
from storage.errors import StoreError

if TYPE_CHECKING:
    from storage.s3_client import S3Options
    from storage.store import Store

DEFAULT_STORE = "fpo-store"
_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def store_url(given: str | None = None, recipes: str | None = None) -> str:
    """Which store: what the command was given, else ``FPO_STORE``, else the recipe's, else ours."""
    return given or os.environ.get("FPO_STORE") or recipes or DEFAULT_STORE


def open_store(
    url: str | Path, *, endpoint: str | None = None, region: str | None = None,
    options: "S3Options | None" = None,
) -> "Store":  # fmt: skip
    """Open a store.

    Args:
        url: a path, ``file:///path`` or ``s3://bucket/prefix``.
        endpoint: of an S3 service other than AWS; else ``AWS_ENDPOINT_URL`` of the environment.
        region: else ``AWS_REGION`` of the environment.
        options: all that can be said of an S3 service, instead of the two before.

    Raises:
        StoreError: another kind of URL, or one that holds what it must not.
    """
    text = str(url)
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise StoreError("the store's URL has control characters in it")
    if text.startswith("s3://"):
        from storage.s3_client import S3Options

        return _open_s3(text, options or S3Options(endpoint, region))
    if text.startswith("file://"):
        text = text.removeprefix("file://")
        if not text.startswith("/"):
            raise StoreError(f"store 'file://{text}': write file:///path, with three slashes")
    elif "://" in text:
        scheme = text.partition("://")[0]
        raise StoreError(
            f"store {scheme}://...: stores are folders (a path or file:///...) and S3 buckets "
            f"(s3://bucket/prefix); set --store or FPO_STORE to one"
        )
    from storage.local import LocalBackend
    from storage.store import Store

    return Store(text, LocalBackend(Path(text).expanduser()))


def _open_s3(url: str, options: "S3Options") -> "Store":
    place = url.removeprefix("s3://").rstrip("/")
    if "@" in place or "?" in place:
        raise StoreError(
            "a store's URL is s3://bucket/prefix and holds nothing else; credentials belong in "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, the endpoint in AWS_ENDPOINT_URL or the "
            "recipe's store.endpoint"
        )
    bucket, _, prefix = place.partition("/")
    if not _BUCKET.match(bucket):
        # Not repeated: it may be a key and a secret.
        raise StoreError("the store's URL names no bucket; write s3://bucket/prefix")
    if prefix:
        check_key(prefix)
    from storage.cache import ReadCache, cache_folder, cache_limit
    from storage.s3 import S3Backend
    from storage.store import Store

    cache = ReadCache(cache_folder() / "store-files", cache_limit())
    return Store(url, S3Backend(bucket, prefix, options, cache, cache_folder() / "scratch"))
