"""What an S3 service or boto3 says when it cannot, in one sentence with the remedy.

No message repeats what boto3 wrote: it can hold keys, signatures and signed addresses.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from botocore import exceptions as aws
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

from storage.errors import StoreError, StoreUnwritable

_CREDENTIALS = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), as for the aws command"
)
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
_NO_KEY = {"NoSuchKey", "404", "NotFound"}
_PRECONDITION = {"PreconditionFailed", "412"}
_FULL = {
    "InsufficientCapacity",
    "QuotaExceeded",
    "XMinioStorageFull",
    "507",
    "ServiceQuotaExceeded",
}


def code_of(error: ClientError) -> str:
    """The service's error code; the HTTP status where the answer had no body (HEAD)."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_missing(error: ClientError) -> bool:
    """Whether the object is not there (the bucket is)."""
    return code_of(error) in _NO_KEY


def is_refused_precondition(error: ClientError) -> bool:
    """Whether If-Match or If-None-Match did not hold."""
    return code_of(error) in _PRECONDITION


class BrokenAnswerError(Exception):
    """An answer that began and did not end well."""


@contextmanager
def told_in_words(bucket: str, endpoint: str) -> Iterator[None]:
    """Turn boto3's errors into StoreErrors; preconditions and missing objects pass through."""
    try:
        yield
    except ClientError as error:
        if is_missing(error) or is_refused_precondition(error):
            raise
        raise explain_refusal(error, bucket, endpoint) from None
    except (
        aws.BotoCoreError, ResponseParserError, S3UploadFailedError, RetriesExceededError,
        ConnectionError, TimeoutError, BrokenAnswerError,
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
    if code in ("SlowDown", "ServiceUnavailable", "InternalError", "500", "502", "503", "504"):
        return StoreError(
            f"{where}: the service keeps failing ({code}) after many attempts; run the same "
            f"command again later, what was finished is kept"
        )
    return StoreError(f"{where}: the service refused to {_action(error)} ({code})")


def explain_failure(error: Exception, bucket: str, endpoint: str) -> StoreError:
    """What did not work before or between the service's answers, and what to do."""
    cause: BaseException = error
    if isinstance(error, RetriesExceededError) and error.last_exception is not None:
        cause = error.last_exception
    if isinstance(error, S3UploadFailedError) and error.__context__ is not None:
        cause = error.__context__
    if isinstance(cause, ClientError):
        return explain_refusal(cause, bucket, endpoint)
    where = f"bucket {bucket!r} at {endpoint}"
    if isinstance(cause, (aws.NoCredentialsError, aws.PartialCredentialsError)):
        return StoreError(f"{where}: no credentials found; {_CREDENTIALS}")
    if isinstance(cause, (aws.ProfileNotFound, aws.CredentialRetrievalError)):
        return StoreError(f"{where}: the AWS profile cannot be used; {_CREDENTIALS}")
    if isinstance(cause, aws.ParamValidationError):
        return StoreError(f"{where}: this is no bucket name or key that S3 allows")
    if isinstance(cause, aws.SSLError):
        return StoreError(f"{where}: TLS failed; is it http:// rather than https://?")
    if isinstance(cause, ResponseParserError):
        return StoreError(f"{where}: what answers there does not speak S3; check the endpoint")
    return StoreError(
        f"{where} cannot be reached ({type(cause).__name__}); check the endpoint (store.endpoint "
        f"in the recipe, or AWS_ENDPOINT_URL) and the network, then run the same command again"
    )


def _action(error: ClientError) -> str:
    words = {
        "PutObject": "write", "UploadPart": "write", "CreateMultipartUpload": "write",
        "CompleteMultipartUpload": "write", "GetObject": "read", "HeadObject": "read",
        "ListObjectsV2": "list", "DeleteObjects": "delete",
    }  # fmt: skip
    return words.get(str(error.operation_name), str(error.operation_name))
