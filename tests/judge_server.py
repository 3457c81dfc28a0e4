"""A scripted judge: the part of OpenAI's chat completions that judging uses, on loopback.

    def script(asked):
        return say("[[A]]") if "first" in asked.text else fail(500)

    with judging(script) as judge:
        settings = JudgeSettings(model="m", base_url=judge.url, key_env=None)
        ...
    assert judge.most_in_flight <= 8
    assert [asked.text for asked in judge.asked] == [...]

A script is called once for each request that arrives, each in a thread of its own: it may wait.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

WAIT_SECONDS = 20.0  # for what a test waits for; it fails then
Alternatives = Mapping[str, float]  # log-probs by token


class Asked(NamedTuple):
    """A request that arrived."""

    body: dict[str, Any]
    headers: dict[str, str]  # names in lower case
    before: int  # how often the same messages had been asked before

    @property
    def text(self) -> str:
        """The last message."""
        return self.body["messages"][-1]["content"]

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return self.body["model"]


class Answer(NamedTuple):
    """What is sent back."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    cut: int | None = None  # the connection is closed after so many bytes of the body


Script = Callable[[Asked], Answer]


def say(
    text: str | None,
    *,
    finish: str = "stop",
    logprobs: Sequence[Alternatives] = (),
    tokens: tuple[int, int] = (11, 7),
    **message: Any,
) -> Answer:
    """A reply.

    Args:
        text: of the judge.
        finish: ``length`` for a reply that reached ``max_tokens``.
        logprobs: for each token of the reply, the log-probs of the likeliest.
        tokens: of prompt and reply, as the usage tells.
        message: more fields of the message.
    """
    content = [
        {
            "token": next(iter(token)), "logprob": next(iter(token.values())), "bytes": None,
            "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in token.items()],
        }
        for token in logprobs
    ]  # fmt: skip
    choice = {
        "index": 0, "finish_reason": finish, "logprobs": {"content": content} if content else None,
        "message": {"role": "assistant", "content": text, **message},
    }  # fmt: skip
    usage = {
        "prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens),
    }  # fmt: skip
    return _json(
        200,
        {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "judge-0613",
            "choices": [choice], "usage": usage,
        },
    )  # fmt: skip


def fail(
    status: int, message: str = "made to fail", *, code: str | None = None,
    param: str | None = None, retry_after: float | str | None = None,
) -> Answer:  # fmt: skip
    """An error as OpenAI words it.

    Args:
        status: of HTTP.
        message: told to the client.
        code: OpenAI's, such as ``insufficient_quota``.
        param: the field of the request that it is about.
        retry_after: seconds, or any text, for the header of that name.
    """
    error = {"message": message, "type": "error", "code": code, "param": param}
    answer = _json(status, {"error": error})
    if retry_after is None:
        return answer
    return answer._replace(headers={**answer.headers, "Retry-After": str(retry_after)})


def garbage(body: bytes = b"<html>busy</html>", content_type: str = "text/html") -> Answer:
    """Status 200 with something else than an answer."""
    return Answer(200, body, {"Content-Type": content_type})


def cut_off(answer: Answer, *, told: bool = True) -> Answer:
    """An answer whose body ends in the middle.

    Args:
        answer: the whole.
        told: whether the header says how long the body should have been.
    """
    half = len(answer.body) // 2
    if told:
        return answer._replace(cut=half)
    return answer._replace(body=answer.body[:half])


def slowly(seconds: float, answer: Answer) -> Answer:
    """The answer, after a while."""
    time.sleep(seconds)
    return answer


def _json(status: int, value: Any) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class JudgeServer:
    """What a server is scripted to do, and what it saw.

    Args:
        script: what it answers.
        key: the only one it takes; None takes everybody.
        models: the only ones it has; None has all.
    """

    def __init__(
        self, script: Script, key: str | None = None, models: Sequence[str] | None = None
    ) -> None:
        self.script, self.key, self.models = script, key, models
        self.url = ""
        self.asked: list[Asked] = []
        self.in_flight = self.most_in_flight = 0
        self.history: list[tuple[float, int]] = []  # monotonic seconds, and in flight since
        self._changed = threading.Condition()

    def wait_until(
        self, reached: Callable[["JudgeServer"], bool], seconds: float = WAIT_SECONDS
    ) -> bool:
        """Block a script until the server's figures are so; False when it takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: reached(self), seconds)

    def answer(self, body: bytes, headers: dict[str, str]) -> Answer:
        """What to send for a request."""
        content = json.loads(body)
        with self._changed:
            before = sum(asked.body["messages"] == content["messages"] for asked in self.asked)
            asked = Asked(content, headers, before)
            self.asked.append(asked)
            self._count(1)
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and given != self.key:
            # As OpenAI says it, with the key's two ends.
            return fail(401, f"Incorrect API key provided: {given[:8]}********{given[-4:]}.")
        if self.models is not None and asked.model not in self.models:
            return fail(404, f"The model `{asked.model}` does not exist", code="model_not_found")
        return self.script(asked)

    def _count(self, change: int) -> None:
        self.in_flight += change
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.history.append((time.monotonic(), self.in_flight))
        self._changed.notify_all()

    def sent(self) -> None:
        """Count an answer as gone."""
        with self._changed:
            self._count(-1)


@contextmanager
def judging(
    script: Script, *, key: str | None = None, models: Sequence[str] | None = None
) -> Iterator[JudgeServer]:
    """Serve while the context is open; see JudgeServer."""
    judge = JudgeServer(script, key, models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else a body waits 40 ms for its headers' receipt

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                self._send(fail(404, "no such path"))
                return
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                answer = judge.answer(body, headers)
            finally:
                judge.sent()  # before the client can know of it, and send the next
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body[: answer.cut])
            self.close_connection = answer.cut is not None

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that was killed, or that gave up

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
