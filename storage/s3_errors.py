"""What an S3 service or boto3 says when it cannot, in one sentence with the remedy.

No message repeats what boto3 wrote: it can hold keys, signatures and signed addresses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from http.client import BadStatusLine, RemoteDisconnected
from typing import Any

from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore import exceptions as aws
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import S3DownloadFailedError, S3ValidationError
from urllib3.exceptions import HTTPError as BrokenOffError

from storage.errors import StoreError, StoreUnwritable

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), as for the aws command"
)
_ENDPOINT = "Check AWS_ENDPOINT_URL, or store.endpoint in the recipe."
_REFUSED = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken",
    "TokenRefreshRequired", "InvalidSecurity", "AuthFailure", "UnrecognizedClientException",
}  # fmt: skip
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "NotSignedUp", "403"}
_REGION = {
    "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
    "301", "307", "TemporaryRedirect",
}  # fmt: skip
_CLOCK = {"RequestTimeTooSkewed", "RequestExpired"}
# Of an upload whose parts the service does not know as we do: a fresh one works.
_LOST_UPLOAD = {"NoSuchUpload", "InvalidPart", "InvalidPartOrder", "MalformedXML"}
_FULL = {
    "InsufficientCapacity",
    "QuotaExceeded",
    "XMinioStorageFull",
    "507",
    "ServiceQuotaExceeded",
}


# What the transfer manager raises: the body broke off too often, or the object was rewritten.
_BROKEN_TRANSFER = (RetriesExceededError, S3DownloadFailedError, S3ValidationError)


def code_of(error: ClientError) -> str:
    """The service's error code; the HTTP status where the answer had no body (HEAD)."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_missing(error: ClientError) -> bool:
    """Whether the object is not there (the bucket is)."""
    return _status(error) == 404 and code_of(error) not in ("NoSuchBucket", "NoSuchUpload")


def is_refused_precondition(error: ClientError) -> bool:
    """Whether If-Match or If-None-Match did not hold (304: as some services say it)."""
    return _status(error) in (304, 412)


def printable(header: str) -> str:
    """Return the beginning of a header's value, for a message."""
    return "".join(c for c in header[:60] if c.isprintable()).strip()


def _status(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def is_broken(error: BaseException) -> bool:
    """Whether an answer did not arrive whole, or an upload's state was lost on the way."""
    cause = _cause(error)
    if isinstance(cause, ClientError):
        return code_of(cause) in _LOST_UPLOAD
    return isinstance(
        cause, (*_BROKEN_TRANSFER, BrokenAnswerError, BrokenOffError, ResponseParserError)
    )


def _cause(error: BaseException) -> BaseException:
    """What boto3's transfer manager wrapped."""
    if isinstance(error, S3UploadFailedError) and error.__context__ is not None:
        return error.__context__
    return error


class BrokenAnswerError(Exception):
    """An answer that began and did not end well."""


class NotS3Error(BrokenAnswerError):
    """An answer that no S3 service gives; the message is its status and kind."""


@contextmanager
def told_in_words(bucket: str, endpoint: str) -> Iterator[None]:
    """Turn boto3's errors into StoreErrors, a missing object included where none can be missing."""
    try:
        yield
    except ClientError as error:
        raise explain_refusal(error, bucket, endpoint) from None
    except (
        *_BROKEN_TRANSFER, aws.BotoCoreError, ResponseParserError, S3UploadFailedError,
        ConnectionError, TimeoutError, BrokenAnswerError, BrokenOffError,
    ) as error:  # fmt: skip
        raise explain_failure(error, bucket, endpoint) from None


def explain_refusal(error: ClientError, bucket: str, endpoint: str) -> StoreError:
    """What the service refused, and what to do."""
    code = code_of(error)
    where = f"bucket {bucket!r} at {endpoint}"
    headers: dict[str, Any] = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if code == "NoSuchBucket":
        return StoreError(f"there is no {where}; create it, or correct the name in the store's URL")
    if code in _REFUSED:
        return StoreError(f"{where}: the credentials were refused ({code}); {_CREDENTIALS}")
    if code in _DENIED:
        return StoreUnwritable(
            f"{where}: access denied; these credentials may not {_action(error)} there. Ask for "
            f"read, write, list and delete on the bucket"
        )
    if code in _CLOCK:
        return StoreError(
            f"{where}: this machine's clock is too far from the service's ({code}; the service has "
            f"{headers.get('date', 'another time')}); set it, best by NTP"
        )
    if code in _REGION:
        region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
        return StoreError(
            f"{where} is in another region{f', {region}' if region else ''}; set store.region in "
            f"the recipe, or AWS_REGION"
        )
    if code in _FULL:
        return StoreUnwritable(f"{where}: no space left there ({code}); free some, or use another")
    if code in ("500", "502", "503", "504"):  # no error document of S3's
        return StoreError(
            f"{where}: what answers there keeps failing ({code}), or does not speak S3; check the "
            f"endpoint, and run the same command again later, what was finished is kept"
        )
    if code in ("SlowDown", "ServiceUnavailable", "InternalError"):
        return StoreError(
            f"{where}: the service keeps failing ({code}) after many attempts; run the same "
            f"command again later, what was finished is kept"
        )
    if _status(error) == 404:
        return StoreError(
            f"{where}: the service finds nothing to {_action(error)} ({code}). The bucket, or what "
            f"this run wrote to it, was deleted. Check that both exist, then run the same command "
            f"again"
        )
    return StoreError(f"{where}: the service refused to {_action(error)} ({code})")


def explain_failure(error: Exception, bucket: str, endpoint: str) -> StoreError:
    """What did not work before or between the service's answers, and what to do."""
    cause = _cause(error)
    if isinstance(cause, RetriesExceededError) and cause.last_exception is not None:
        cause = cause.last_exception
    if isinstance(cause, ClientError):
        return explain_refusal(cause, bucket, endpoint)
    where = f"bucket {bucket!r} at {endpoint}"
    if isinstance(cause, (aws.NoCredentialsError, aws.PartialCredentialsError)):
        return StoreError(f"{where}: no credentials found; {_CREDENTIALS}")
    if isinstance(cause, (aws.SSOError, aws.TokenRetrievalError)):
        return StoreError(f"{where}: the sign-in has expired; run `aws sso login` and try again")
    if isinstance(cause, aws.CredentialRetrievalError):
        return StoreError(f"{where}: the credentials could not be fetched; {_CREDENTIALS}")
    if isinstance(cause, aws.ParamValidationError):
        return StoreError(f"{where}: this is no bucket name or key that S3 allows")
    if isinstance(cause, aws.SSLError):
        return StoreError(f"{where}: TLS failed; is it http:// rather than https://?")
    if isinstance(cause, ResponseParserError):
        return StoreError(f"{where}: what answers there does not speak S3. {_ENDPOINT}")
    if isinstance(cause, NotS3Error):
        tls = " Is it https:// rather than http://?" if _may_be_tls(cause, endpoint) else ""
        return StoreError(
            f"{where}: what answers there does not speak S3 ({cause}). {_ENDPOINT}{tls}"
        )
    if isinstance(cause, aws.ReadTimeoutError):
        return StoreError(
            f"{where}: something accepts connections there and does not answer. {_ENDPOINT} If "
            f"they are right, run the same command again later"
        )
    if isinstance(cause, aws.ConnectionClosedError) and _is_no_http(cause):
        return StoreError(
            f"{where}: what answers there does not speak HTTP, nor S3. {_ENDPOINT} Is it https:// "
            f"rather than http://?"
        )
    return StoreError(
        f"{where} cannot be reached ({type(cause).__name__}); check the endpoint (store.endpoint "
        f"in the recipe, or AWS_ENDPOINT_URL) and the network, then run the same command again"
    )


def _may_be_tls(cause: NotS3Error, endpoint: str) -> bool:
    """Whether a server refused plain HTTP on its TLS port, as most word it: by 400."""
    return endpoint.startswith("http://") and str(cause).startswith("400")


def _is_no_http(error: aws.ConnectionClosedError) -> bool:
    """Whether bytes came that are no HTTP, rather than none."""
    inner = getattr(error.kwargs.get("error"), "args", ())
    return any(
        isinstance(cause, BadStatusLine) and not isinstance(cause, RemoteDisconnected)
        for cause in inner
    )


def _action(error: ClientError) -> str:
    words = {
        "PutObject": "write", "UploadPart": "write", "CreateMultipartUpload": "write",
        "CompleteMultipartUpload": "write", "GetObject": "read", "HeadObject": "read",
        "ListObjectsV2": "list", "DeleteObject": "delete", "ListMultipartUploads": "list",
    }  # fmt: skip
    return words.get(str(error.operation_name), str(error.operation_name))
