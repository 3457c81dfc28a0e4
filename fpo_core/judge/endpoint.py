"""The connection to a judge's endpoint, and its errors in words.

The ``openai`` package tries again what is worth it (429, 5xx, silence, a connection or body that
breaks off), as long after as the endpoint's Retry-After says. A key, or a piece of one that an
endpoint repeats, never gets into a message.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from fpo_core.errors import FPOError
from fpo_core.judge.wire import DECLINABLE
from fpo_core.recipe.judge import JudgeSettings

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

CONNECT_SECONDS = 10.0
LONGEST_REASON = 300
# So many characters of a key in a row are a piece of it.
_PIECE = 4


class NotAnswered(Exception):
    """A request without an answer; the message is the reason.

    Args:
        reason: for the user.
        own_fault: the endpoint works, it is this request that it does not take.
    """

    def __init__(self, reason: str, *, own_fault: bool = False) -> None:
        super().__init__(reason)
        self.own_fault = own_fault


def check_judge(settings: JudgeSettings) -> None:
    """Refuse a judge that cannot be asked from here; asks the endpoint nothing.

    Raises:
        FPOError: a package or the key is missing, with what to do.
    """
    for package in ("openai", "aiolimiter"):
        if importlib.util.find_spec(package) is None:
            raise FPOError(
                f"a judge needs the package {package}, which is not installed: run "
                f"`pip install 'fpo-pipeline[eval]'` in this environment"
            )
    read_key(settings)


def read_key(settings: JudgeSettings) -> str | None:
    """The endpoint's key from the environment; None where it needs none.

    Raises:
        FPOError: the variable is not set, or holds no key.
    """
    name = settings.key_env
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise FPOError(
            f"the judge {settings.model} at {settings.host} needs a key, and the environment "
            f"variable {name} is not set: export it, name another one in judge.key_env, or set "
            f"judge.key_env to null for an endpoint that needs none"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise FPOError(
            f"the environment variable {name} (judge.key_env) holds no key: it has spaces, line "
            f"breaks or letters outside ASCII in it"
        )
    return key


def connect(settings: JudgeSettings, key: str | None) -> "AsyncOpenAI":
    """A client of the endpoint, for one event loop."""
    from aiolimiter import AsyncLimiter
    from openai import AsyncOpenAI, DefaultAsyncHttpx2Client, Timeout

    hooks: dict[str, list[Any]] = {}
    if settings.requests_per_minute:
        # One at a time, evenly spaced: a bucket of a minute's size would let through twice as many
        # in the first minute. As a hook it holds for what is tried again, too.
        limiter = AsyncLimiter(1, 60 / settings.requests_per_minute)

        async def wait_for_turn(_request: object) -> None:
            await limiter.acquire()

        hooks["request"] = [wait_for_turn]
    silence = settings.timeout_seconds
    return AsyncOpenAI(
        api_key=key or "none",  # the package insists on one
        base_url=settings.base_url,
        timeout=Timeout(silence, connect=min(silence, CONNECT_SECONDS)),
        max_retries=settings.retries,
        http_client=DefaultAsyncHttpx2Client(event_hooks=hooks),
    )


def declined_setting(error: "APIError") -> str | None:
    """The setting that the endpoint says this model does not take (OpenAI's reasoning models)."""
    if getattr(error, "status_code", None) != 400 or error.param not in DECLINABLE:
        return None
    return error.param if error.code in ("unsupported_parameter", "unsupported_value") else None


def explained(error: "APIError", settings: JudgeSettings, key: str | None) -> Exception:
    """What to raise in an error's place: FPOError where going on is pointless, else NotAnswered."""
    from openai import APIConnectionError, APIStatusError

    if isinstance(error, APIConnectionError):
        return _no_answer(error, settings)
    if isinstance(error, APIStatusError):
        return _refused(error, settings, key)
    return NotAnswered(f"the request failed ({type(error).__name__})")


def _no_answer(error: "APIError", settings: JudgeSettings) -> Exception:
    import httpx2
    from openai import APITimeoutError

    cause = error.__cause__
    if isinstance(cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError)):
        return FPOError(
            f"the judge's endpoint {settings.host} cannot be reached "
            f"({str(cause) or type(cause).__name__}): check judge.base_url, that its server runs, "
            f"and the network"
        )
    tries = "1 try" if settings.retries == 0 else f"{settings.retries + 1} tries"
    if isinstance(error, APITimeoutError):
        return NotAnswered(
            f"no answer within {settings.timeout_seconds:g} s in {tries} (judge.timeout_seconds)"
        )
    return NotAnswered(f"the connection broke off in {tries}")


def _refused(error: Any, settings: JudgeSettings, key: str | None) -> Exception:
    status, who = error.status_code, f"the judge's endpoint {settings.host}"
    if status in (401, 403):
        if settings.key_env is None:
            return FPOError(
                f"{who} wants a key (status {status}): set judge.key_env to the name of the "
                f"environment variable that holds one"
            )
        return FPOError(
            f"{who} refused the key in {settings.key_env} (status {status}): check that it is this "
            f"endpoint's, whole and still valid, and that it may use {settings.model}"
        )
    if status in (404, 405):
        return FPOError(
            f"{who} has no model {settings.model!r}, or no chat completions at judge.base_url "
            f"(status {status}): check judge.model, and that judge.base_url is what "
            f"/chat/completions follows, usually ending in /v1"
        )
    if status == 402 or error.code == "insufficient_quota":
        return FPOError(
            f"{who} says that the account has no credit left (status {status}); what was answered "
            f"is kept, the same command goes on from there"
        )
    return NotAnswered(
        f"status {status}{_said(error, key)}", own_fault=400 <= status < 500 and status != 429
    )


def _said(error: Any, key: str | None) -> str:
    """The endpoint's own words, on one line, where they hold no piece of the key."""
    body = error.body
    text = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
    if not isinstance(text, str) or _has_piece(text, key):
        return ""
    text = " ".join(text.split())
    return f": {text[:LONGEST_REASON]}{'...' if len(text) > LONGEST_REASON else ''}"


def _has_piece(text: str, key: str | None) -> bool:
    if not key:
        return False
    pieces = {key[start : start + _PIECE] for start in range(max(1, len(key) - _PIECE + 1))}
    return any(piece in text for piece in pieces)
