"""Filesystems of s3:// and https:// addresses, and what their errors mean for a user.

S3 comes through pyarrow, which is here anyway: s3fs pins a botocore of its own, which boto3 has to
follow. No text of an error that a library wrote is shown, since it may hold a signed address.
"""

import errno
import os
import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

CONNECT_SECONDS = 15
SILENT_SECONDS = 60
_AWS_ERROR = re.compile(r"AWS Error ([A-Z_]+)")
# Of the cache folder; the network has other errors.
_DISK = {errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


class State(NamedTuple):
    """What a server says about a file without sending it.

    Attributes:
        etag: the server's mark of the content.
        size: in bytes.
        mtime: when it was last changed.
    """

    etag: str | None
    size: int | None
    mtime: str | None


class Problem(NamedTuple):
    """Why a file could not be had.

    Attributes:
        text: what is wrong and what to do, with no part of the address.
        offline: whether the server was not reached, so that an earlier copy may serve.
    """

    text: str
    offline: bool = False


def filesystem(scheme: str, bucket: str) -> Any:
    """Return the fsspec filesystem of an address.

    Args:
        scheme: http, https or s3.
        bucket: the bucket, whose region is asked for where nothing says it.

    Raises:
        OSError: the region cannot be found out.
    """
    return _s3(bucket) if scheme == "s3" else _http()


def state_of(filesystem: Any, path: str) -> State:
    """Ask a server about a file.

    Args:
        filesystem: the fsspec filesystem.
        path: the address, or bucket and key.

    Raises:
        OSError: the file does not exist, or the server does not answer.
    """
    info = filesystem.info(path)
    if info["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, "a folder")
    if "ETag" in info or "Last-Modified" in info or "mtime" not in info:
        return State(info.get("ETag"), info.get("size"), info.get("Last-Modified"))
    with filesystem.fs.open_input_stream(path) as stream:
        etag = (stream.metadata() or {}).get("ETag")
    mtime = info["mtime"].isoformat() if info["mtime"] else None
    return State(etag.decode() if etag else None, info["size"], mtime)


def problem_of(error: BaseException) -> Problem:
    """Say what an error of a filesystem means.

    Args:
        error: what was raised; fsspec hides the cause of many behind FileNotFoundError.
    """
    import aiohttp

    while error.__cause__ is not None and not isinstance(error, aiohttp.ClientError):
        error = error.__cause__
    if isinstance(error, aiohttp.TooManyRedirects):
        return Problem("it redirects too often. Check the address")
    if isinstance(error, aiohttp.ClientResponseError):
        return _of_status(error.status)
    if isinstance(error, aiohttp.ClientSSLError):
        return Problem(
            "the server's certificate cannot be verified. Set SSL_CERT_FILE to the authority's "
            "certificate if you trust it"
        )
    if isinstance(error, aiohttp.InvalidURL):
        return Problem("it, or what it redirects to, is no valid address")
    if isinstance(error, FileNotFoundError):
        return _of_status(404)
    if isinstance(error, IsADirectoryError):
        return Problem(
            "it is a folder. Give a file, or a pattern such as s3://BUCKET/FOLDER/*.jsonl"
        )
    aws = _AWS_ERROR.search(str(error))
    if aws:
        return _of_aws(aws[1], str(error))
    if isinstance(error, OSError) and error.errno in _DISK:
        return Problem(
            f"it cannot be stored ({os.strerror(error.errno)}). Free space, or set FPO_CACHE to "
            f"another folder"
        )
    if isinstance(error, aiohttp.ClientPayloadError):
        return Problem("the connection broke off. Run the same command again", offline=True)
    if isinstance(error, (OSError, aiohttp.ClientError)):
        text = "the server cannot be reached. Check the network and the address"
        return Problem(text, offline=True)
    return Problem(f"it cannot be fetched ({type(error).__name__}). Check the address")


def _of_status(status: int) -> Problem:
    if status in (404, 410):
        return Problem("it does not exist. Check the address")
    if status in (401, 403):
        return Problem(
            f"access is denied (HTTP {status}). Check the credentials, or whether a signed address "
            f"has expired"
        )
    busy = status == 429 or status >= 500
    return Problem(f"the server answered HTTP {status}. Try again later", offline=busy)


def _of_aws(code: str, text: str) -> Problem:
    if (
        "ACCESS_DENIED" in code
        or "CREDENTIAL" in code
        or "ACCESS_KEY" in code
        or "HTTP status 403" in text
    ):
        return Problem(
            "access is denied. Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
            "AWS_SESSION_TOKEN)"
        )
    if "NO_SUCH" in code or "NOT_FOUND" in code or "HTTP status 404" in text:
        return _of_status(404)
    if code == "NETWORK_CONNECTION":
        return Problem(
            "the server cannot be reached. Check the network and AWS_ENDPOINT_URL", offline=True
        )
    return Problem(f"the object store answered {code}. Check AWS_REGION and AWS_ENDPOINT_URL")


def _http() -> Any:
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS
    )
    # trust_env: the proxies of the environment.
    options = {"trust_env": True, "timeout": timeout}
    return HTTPFileSystem(skip_instance_cache=True, client_kwargs=options)


def _s3(bucket: str) -> Any:
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    environment = os.environ
    options: dict[str, Any] = {}
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint:
        parts = urlsplit(endpoint)
        options |= {"scheme": parts.scheme or "https", "endpoint_override": parts.netloc}
    elif not region:
        region = resolve_s3_region(bucket)
    if region:
        options["region"] = region
    store = S3FileSystem(connect_timeout=CONNECT_SECONDS, request_timeout=SILENT_SECONDS, **options)
    return ArrowFSWrapper(store, skip_instance_cache=True)
