"""What a judge answered, kept by the content of what it was asked.

A request's digest is the sha256 of the canonical JSON of everything that can change the answer: the
judge's identity, the messages and the sampling settings. Its ``key`` (which question, which order)
is not in it, nor is the address of the endpoint. An entry is JSON that holds this content, the
reply, and a checksum of the reply; one that does not fit its digest or its checksum is not trusted.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, ValidationError

from fpo_core.bench.model import JudgeRequest, Reply
from fpo_core.recipe.judge import JudgeSettings

FORMAT = 1


class JudgmentCache(Protocol):
    """Entries by digest; its methods may be called from several threads at a time."""

    def get_all(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The entries that are there."""
        ...

    def put(self, digest: str, entry: bytes) -> bytes:
        """Keep an entry where there is none; returns the one that is there now."""
        ...

    def mend(self, digest: str, entry: bytes) -> None:
        """Write an entry over a damaged one."""
        ...


class Answer(BaseModel):
    """A reply, and which model the endpoint says it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    reply: Reply
    served_model: str | None = None
    declined: tuple[str, ...] = ()  # settings that the model did not take, of wire.DECLINABLE


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    request: dict[str, Any]
    answer: Answer
    sha256: str  # of the answer's canonical JSON


def request_digest(settings: JudgeSettings, request: JudgeRequest) -> str:
    """The name of a request's entry, 64 hex digits."""
    return _digest(_content(settings, request))


def make_entry(settings: JudgeSettings, request: JudgeRequest, answer: Answer) -> bytes:
    """What is kept of an answer."""
    content = _plain(answer)
    return _canonical_json(
        {
            "format": FORMAT,
            "request": _content(settings, request),
            "answer": content,
            "sha256": _digest(content),
        }
    )


def read_entry(digest: str, entry: bytes) -> Answer | None:
    """The answer in an entry; None where the entry is damaged, or of another request or format."""
    try:
        found = _Entry.model_validate_json(entry)
    except ValidationError:
        return None
    if found.format != FORMAT or _digest(found.request) != digest:
        return None
    return found.answer if found.sha256 == _digest(_plain(found.answer)) else None


def _content(settings: JudgeSettings, request: JudgeRequest) -> dict[str, Any]:
    return {
        "judge": settings.identity,
        "messages": [{"role": role, "content": text} for role, text in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": float(request.temperature),
        "top_logprobs": request.top_logprobs,
    }


def _plain(answer: Answer) -> dict[str, Any]:
    content = {"reply": answer.reply._asdict(), "served_model": answer.served_model}
    return content | ({"declined": list(answer.declined)} if answer.declined else {})


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical_json(value)).hexdigest()


def _canonical_json(value: Mapping[str, Any]) -> bytes:
    """As docs/storage.md defines it."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
