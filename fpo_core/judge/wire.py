"""A request as OpenAI's chat completions take it, and the answer's body, checked."""

import math
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from fpo_core.bench.model import JudgeRequest, Reply
from fpo_core.judge.cache import Answer
from fpo_core.validation import explain

# What some models do not take, and what is sent instead, in words.
DECLINABLE = {
    "max_tokens": "max_completion_tokens, which counts hidden reasoning, too",
    "temperature": "none: it answers at its own",
}


class BadAnswer(Exception):
    """A body that is no answer; the message is the reason alone."""


class Withheld(Exception):
    """An answer that the endpoint keeps to itself; the message is the reason alone."""


class _Alternative(BaseModel):
    token: str
    logprob: float


class _Token(BaseModel):
    top_logprobs: list[_Alternative] = []


class _Logprobs(BaseModel):
    content: list[_Token] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str
    logprobs: _Logprobs | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    model: str | None = None
    usage: _Usage | None = None


def request_body(
    model: str, request: JudgeRequest, declined: Collection[str] = ()
) -> dict[str, Any]:
    """The arguments of ``chat.completions.create``.

    Args:
        model: the judge, as the endpoint names it.
        request: what it is asked.
        declined: of ``DECLINABLE``, what the endpoint has said that this model does not take.
    """
    limit = "max_completion_tokens" if "max_tokens" in declined else "max_tokens"
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": role, "content": text} for role, text in request.messages],
        limit: request.max_tokens,
    }
    if "temperature" not in declined:
        body["temperature"] = request.temperature
    if request.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return body


def read_answer(body: bytes) -> Answer:
    """The answer in a body.

    Raises:
        BadAnswer: it is cut off, or no chat completion.
        Withheld: the endpoint's content filter took the text away.
    """
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        faults = explain(error, _Completion)
        raise BadAnswer(f"the answer is no chat completion ({faults})") from None
    choice, usage = completion.choices[0], completion.usage or _Usage()
    text = choice.message.content if choice.message.content is not None else choice.message.refusal
    if choice.finish_reason == "content_filter":
        raise Withheld("the endpoint's content filter withheld the answer")
    if text is None:
        if choice.finish_reason != "length":  # there, all tokens went into its reasoning
            raise BadAnswer("the answer has no text")
        text = ""
    tokens = choice.logprobs.content if choice.logprobs else None
    return Answer(
        reply=Reply(
            text=text,
            finish=choice.finish_reason,
            top_logprobs=tuple(_alternatives(token) for token in tokens or ()),
            prompt_tokens=usage.prompt_tokens,
            reply_tokens=usage.completion_tokens,
        ),
        served_model=completion.model,
    )


def _alternatives(token: _Token) -> tuple[tuple[str, float], ...]:
    """An alternative of probability 0, which some endpoints list, says nothing."""
    return tuple(
        (other.token, other.logprob) for other in token.top_logprobs if math.isfinite(other.logprob)
    )
