"""The boto3 client: retries, checksums, where the service is.

botocore's ``standard`` mode retries what is transient (5xx, throttling, connections, timeouts) with
exponential backoff and full jitter, and nothing else. Two small hooks add what it lacks: bytes
that were damaged on the way to the store and answers that broke off are tried again, and every body
carries its sha256 in a header, which the service verifies. The header is ours because botocore's
own checksums travel as a trailer, which some S3 services store as part of the object (boto3 issue
4435).
"""

import base64
import functools
import hashlib
import os
import random
from typing import Any, NamedTuple

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ProfileNotFound
from urllib3.exceptions import HTTPError as BrokenOffError

from storage.errors import StoreError

MAX_ATTEMPTS = 10
_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 20.0

# Refusals of a request that was right when it left us.
DAMAGED_ON_THE_WAY = {
    "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch",
    "IncompleteBody", "ConditionalRequestConflict",
}  # fmt: skip


class S3Options(NamedTuple):
    """Where an S3 service is; what is None comes from the environment. Holds no credentials."""

    endpoint: str | None = None
    region: str | None = None
    read_timeout: float = 60.0  # seconds without a byte before a request is tried again
    max_attempts: int = MAX_ATTEMPTS


def make_client(options: S3Options, *, sha256: bool = True) -> Any:
    """A boto3 S3 client. Credentials come from the standard AWS chain only.

    Args:
        options: where the service is.
        sha256: every body carries its sha256.

    Raises:
        StoreError: an endpoint that is not an http(s) address, or that holds credentials.
    """
    try:
        return _client(options, sha256)
    except ProfileNotFound:
        raise StoreError(
            "the AWS profile that AWS_PROFILE names is not in the AWS configuration; correct it, "
            "or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    except (BotoCoreError, ValueError) as error:
        # Its words can hold what is in the configuration.
        raise StoreError(
            f"the AWS configuration cannot be used ({type(error).__name__}); look at "
            f"AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (both or "
            f"neither), and ~/.aws/config"
        ) from None


def _client(options: S3Options, sha256: bool) -> Any:
    session = _session(frozenset(i for i in os.environ.items() if i[0].startswith("AWS_")))
    region = options.region or os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    endpoint = options.endpoint or _endpoint_of_environment()
    if endpoint and ("@" in endpoint or not endpoint.startswith(("http://", "https://"))):
        raise StoreError(
            "the store's endpoint has to be an http:// or https:// address without a user name; "
            "credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    config = Config(
        retries={"mode": "standard", "total_max_attempts": options.max_attempts},
        connect_timeout=10,
        read_timeout=options.read_timeout,
        max_pool_connections=32,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if endpoint else "auto"},
        user_agent_extra="fpo-pipeline",
    )
    client = session.client("s3", endpoint_url=endpoint, region_name=region, config=config)
    events = client.meta.events
    for operation in ("PutObject", "UploadPart") if sha256 else ():
        events.register(f"before-parameter-build.s3.{operation}", _add_sha256)
    events.register("needs-retry.s3", _Resend(options.max_attempts))
    return client


@functools.lru_cache(maxsize=4)
def _session(_environment: frozenset[tuple[str, str]]) -> Session:
    """One session for an environment: a role is assumed once, a code for it asked once."""
    return Session()


def _endpoint_of_environment() -> str | None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        if os.environ.get(name):
            return os.environ[name]
    return None


def _add_sha256(params: dict[str, Any], **_: Any) -> None:
    body = params["Body"]
    if isinstance(body, bytes):
        digest = hashlib.sha256(body)
    else:
        start = body.tell()
        digest = hashlib.sha256()
        while block := body.read(1 << 20):
            digest.update(block)
        body.seek(start)
    params["ChecksumSHA256"] = base64.b64encode(digest.digest()).decode()


class _Resend:
    """A handler of botocore's ``needs-retry`` event: seconds to wait, or None for no retry."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts

    def __call__(
        self, response: Any, attempts: int, caught_exception: Exception | None = None, **_: Any
    ) -> float | None:
        code = response[1].get("Error", {}).get("Code") if response else None
        # botocore lets urllib3's errors through when the body of an answer breaks off.
        again = code in DAMAGED_ON_THE_WAY or isinstance(caught_exception, BrokenOffError)
        return backoff(attempts) if again and attempts < self.max_attempts else None


def backoff(attempts: int) -> float:
    """Seconds to wait after so many attempts: exponential, with full jitter."""
    longest = min(_MAX_BACKOFF_SECONDS, _BACKOFF_SECONDS * 2**attempts)
    return random.uniform(0, longest)  # noqa: S311 - jitter, no secret
