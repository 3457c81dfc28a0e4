"""One bucket of an S3 service: the client that talks to it, and how long it is asked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import tenacity
from botocore.exceptions import (
    FlexibleChecksumError,
    IncompleteReadError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from storage.s3_answers import check_answer
from storage.s3_client import S3Options, backoff, make_client
from storage.s3_errors import BrokenAnswerError, is_broken, printable, told_in_words

T = TypeVar("T")
ATTEMPTS, FIRST_ATTEMPTS, FIRST_SECONDS = 8, 3, 15.0
BLOCK_BYTES = 1 << 20

# What reading a body can raise; botocore tries again only as long as no answer has begun.
_BROKEN_BODY = (
    IncompleteReadError, ReadTimeoutError, ResponseStreamingError, FlexibleChecksumError,
    ConnectionError, TimeoutError,
)  # fmt: skip


class Bucket:
    """A bucket and a client for it.

    Args:
        name: of the bucket.
        prefix: of the keys that are ours: rights may end there.
        options: where the service is.
    """

    def __init__(self, name: str, prefix: str, options: S3Options) -> None:
        self.name, self._prefix, self._options = name, prefix, options
        self._server = ""
        self._patient = self._make_client(options)
        self.endpoint: str = self._patient.meta.endpoint_url
        self.region: str = self._patient.meta.region_name
        self._met = False
        self._guards: dict[str, Callable[[], None]] = {}
        events = self._patient.meta.events
        for operation in ("PutObject", "CompleteMultipartUpload"):
            events.register(f"before-parameter-build.s3.{operation}", self._choose_guard)
            events.register(f"request-created.s3.{operation}", _ask_guard)

    @property
    def client(self) -> Any:
        """The client, after a first contact that is quick to say what is set up wrongly.

        Later a service may be away for a minute: then patience serves better than an error.
        """
        if not self._met:
            attempts = min(FIRST_ATTEMPTS, self._options.max_attempts)
            timeout = min(FIRST_SECONDS, self._options.read_timeout)
            options = self._options._replace(max_attempts=attempts, read_timeout=timeout)
            quick = self._make_client(options)
            with self.in_words():
                again(
                    lambda: quick.list_objects_v2(Bucket=self.name, Prefix=self._prefix, MaxKeys=1),
                    attempts,
                )
            self._met = True
        return self._patient

    @contextmanager
    def guarded(self, name: str, still_ours: Callable[[], None]) -> Iterator[None]:
        """Have every attempt to write the object ask first whether it is still ours to write.

        Asked where the object would change, so that a run that was cut off in the middle of an
        upload cannot end it over what its successor wrote.
        """
        self._guards[name] = still_ours
        try:
            yield
        finally:
            del self._guards[name]

    @property
    def in_full(self) -> str:
        """The bucket in messages: its name, the endpoint, and what the service calls itself."""
        server = f" (Server: {self._server})" if self._server else ""
        return f"bucket {self.name!r} at {self.endpoint}{server}"

    def without_sha256(self) -> Any:
        """Return another client, whose writes carry no checksum header."""
        return self._make_client(self._options, sha256=False)

    def _make_client(self, options: S3Options, *, sha256: bool = True) -> Any:
        client = make_client(options, sha256=sha256)
        # With this name before botocore's own handler, which calls a list that is no XML a 500.
        client.meta.events.register_first("before-parse.*.*", self._look)
        return client

    def _look(self, operation_model: Any, response_dict: dict[str, Any], **_: Any) -> None:
        self._server = printable(response_dict["headers"].get("server", ""))
        check_answer(operation_model.name, response_dict)

    def _choose_guard(self, params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
        context["fpo_guard"] = self._guards.get(params["Key"])

    def in_words(self) -> AbstractContextManager[None]:
        """A context in which boto3's errors become StoreErrors."""
        return told_in_words(self.name, self.endpoint)


def _ask_guard(request: Any, **_: Any) -> None:
    guard = request.context.get("fpo_guard")
    if guard is not None:
        guard()


def again(call: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """Call until an answer arrives whole; what the service refuses is not asked again."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_broken),
        stop=tenacity.stop_after_attempt(attempts),
        wait=lambda state: backoff(state.attempt_number),
        reraise=True,
    )(call)


def blocks(answer: Mapping[str, Any]) -> Iterator[bytes]:
    """A body, block by block; BrokenAnswerError where it breaks off."""
    try:
        yield from answer["Body"].iter_chunks(BLOCK_BYTES)
    except _BROKEN_BODY as error:
        raise BrokenAnswerError(type(error).__name__) from error
