"""The endpoint backend against a real HTTP server that answers as it is told."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fpo_core.bench.model import Question
from fpo_core.errors import FPOError
from fpo_core.generation import endpoint
from fpo_core.generation.answers import Prompt, Sampling
from fpo_core.generation.endpoint import EndpointBackend
from fpo_core.generation.prompts import Wanted, answer_questions

pytest.importorskip("openai")
KEY = "made-up-key-17"
Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


class Served:
    """What a server was asked, and how it answers: status and JSON, by request and its number."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked, self.keys = answer, [], []
        self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    def take(self, request: dict[str, Any], key: str) -> tuple[int, Any]:
        with self._lock:
            number = len(self.asked)
            self.asked.append(request)
            self.keys.append(key)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return self.answer(request, number)
        finally:
            with self._lock:
                self.in_flight -= 1


@pytest.fixture
def serve():
    """Start a server on the loopback interface; gives its base URL and what it was asked."""
    servers = []

    def start(answer: Answer) -> tuple[str, Served]:
        served = Served(answer)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status, content = 404, {"error": {"message": f"no {self.path}"}}
                if self.path == "/v1/chat/completions":
                    status, content = served.take(json.loads(body), self.headers["Authorization"])
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "1")
                with suppress(ConnectionError):  # who asked may have left
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/v1", served

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def said(text: str, finish: str = "stop", **usage: int) -> dict[str, Any]:
    choice = {
        "index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}
    }  # fmt: skip
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m",
             "choices": [choice]}  # fmt: skip
    return {**whole, "usage": {"prompt_tokens": 3, "total_tokens": 9, **usage}} if usage else whole


def backend(url: str, key_env: str | None = None, requests: int = 4) -> EndpointBackend:
    return EndpointBackend(url, "tiny", key_env, Sampling(50, 0.9), requests)


def prompts(number: int) -> list[Prompt]:
    asked = [({"role": "user", "content": f"number {n}"},) for n in range(number)]
    return [Prompt(f"q{n}", 0, 0.7, 0, 40 + n, messages, ()) for n, messages in enumerate(asked)]


def test_two_turns_are_asked_with_their_settings_and_seeds(serve):
    def answer(request, _number):
        text = f" reply to {request['messages'][-1]['content']}\n"
        return 200, said(text, "length" if "dog" in text else "stop", completion_tokens=6)

    url, served = serve(answer)
    questions = [Question("m", ("the fox", "the dog")), Question("s", ("the cat",))]
    found = {
        (a.prompt.question_id, a.prompt.turn): a
        for a in answer_questions(backend(url), questions, Wanted((0.7,), 1, 3), None)
    }
    assert {key: answer.text for key, answer in found.items()} == {
        ("m", 0): "reply to the fox", ("m", 1): "reply to the dog", ("s", 0): "reply to the cat"
    }  # fmt: skip
    assert found["m", 1].stop == "length"
    assert found["s", 0].stop == "end of turn"
    assert (found["s", 0].tokens, found["s", 0].answer_ids, found["s", 0].prompt.ids) == (6, [], [])
    (second,) = (request for request in served.asked if len(request["messages"]) == 3)
    assert second == {
        "model": "tiny", "max_tokens": 50, "temperature": 0.7, "top_p": 0.9,
        "seed": found["m", 1].prompt.seed,
        "messages": [
            {"role": "user", "content": "the fox"},
            {"role": "assistant", "content": "reply to the fox"},
            {"role": "user", "content": "the dog"},
        ],
    }  # fmt: skip


def test_requests_in_flight_are_bounded_and_used(serve):
    together = threading.Barrier(3)

    def answer(request, _number):
        together.wait(timeout=30)  # goes on only when three are here
        time.sleep(0.02)
        return 200, said(request["messages"][-1]["content"])

    url, served = serve(answer)
    found = list(backend(url, requests=3).generate(prompts(9)))
    assert served.most_in_flight == 3
    assert sorted(answer.text for answer in found) == [f"number {n}" for n in range(9)]
    assert all(answer.tokens == 0 for answer in found), "the server does not say"


def test_what_passes_is_asked_again(serve):
    url, served = serve(
        lambda _, number: ((429, 503, 500)[number], {}) if number < 3 else (200, said("yes"))
    )
    (answer,) = backend(url).generate(prompts(1))
    assert answer.text == "yes"
    assert len(served.asked) == 4
    assert served.asked[0] == served.asked[3]


def test_answers_come_as_they_are_done_and_leaving_ends_the_rest(serve):
    release = threading.Event()

    def answer(request, _number):
        if request["messages"][-1]["content"] != "number 2":
            release.wait(timeout=30)
        return 200, said("done")

    url, _ = serve(answer)
    answers = backend(url).generate(prompts(3))
    assert next(answers).prompt.question_id == "q2"
    answers.close()  # pyright: ignore[reportAttributeAccessIssue]
    release.set()


def test_the_key_is_sent_and_never_told(serve, monkeypatch):
    monkeypatch.setenv("TINY_KEY", KEY)
    url, served = serve(lambda *_: (401, {"error": {"message": f"Incorrect API key: {KEY}"}}))
    with pytest.raises(FPOError, match=r"refuses the key in TINY_KEY \(status 401\)") as told:
        list(backend(url, "TINY_KEY").generate(prompts(2)))
    assert served.keys[0] == f"Bearer {KEY}"
    url, _ = serve(lambda *_: (400, {"error": {"message": f"context too long for {KEY}"}}))
    with pytest.raises(FPOError, match=r"question 'q0' .*status 400.*context too long") as other:
        list(backend(url, "TINY_KEY").generate(prompts(1)))
    for error in (told, other):
        assert KEY not in str(error.value)
        assert error.value.__cause__ is None
    monkeypatch.delenv("TINY_KEY")
    with pytest.raises(FPOError, match="environment variable TINY_KEY, which key_env names, is no"):
        backend(url, "TINY_KEY")


REFUSED = {
    "other JSON": (200, {"hello": 1}, "question 'q0' with something that is no chat completion"),
    "a list": (200, [1], "no chat completion"),
    "no choice": (200, {**said(""), "choices": []}, "no chat completion"),
    "wrong path": (404, {"error": {"message": "no model tiny"}}, "status 404.*no model tiny"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_answer_is_told(serve, case):
    status, content, message = REFUSED[case]
    url, _ = serve(lambda *_: (status, content))
    with pytest.raises(FPOError, match=message):
        list(backend(url).generate(prompts(1)))


def test_an_endpoint_that_is_down_is_told(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    with pytest.raises(FPOError, match=r"http://127\.0\.0\.1:9/v1 cannot be reached; check base"):
        list(backend("http://127.0.0.1:9/v1").generate(prompts(1)))
    monkeypatch.setattr(endpoint, "TIMEOUT_SECONDS", 0.05)
    release = threading.Event()
    url, _ = serve(lambda *_: (release.wait(timeout=30), (200, said("late")))[1])
    with pytest.raises(FPOError, match=r"did not answer question 'q0' within 0 s, 2 times"):
        list(backend(url).generate(prompts(1)))
    release.set()


def test_a_filtered_answer_keeps_the_endpoints_word(serve):
    url, _ = serve(lambda *_: (200, said("", "content_filter")))
    (answer,) = backend(url).generate(prompts(1))
    assert (answer.text, answer.stop) == ("", "content_filter")
