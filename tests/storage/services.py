"""S3 services with one odd habit each: a proxy before the real object store."""

import http.client
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.storage.places import BUCKET


class Request(NamedTuple):
    """What a client asked; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Answer(NamedTuple):
    """What it is answered."""

    status: int
    headers: dict[str, str]
    body: bytes


PassOn = Callable[[], Answer]
Habit = Callable[[Request, PassOn], Answer]


@contextmanager
def service(seaweed, habit: Habit) -> Iterator[tuple[str, list[Request]]]:
    """The endpoint of the object store behind a habit, and the requests that come to it."""
    requests: list[Request] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "OddProxy", ""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, self.path, headers, body)
            requests.append(request)
            answer = habit(request, lambda: _pass_on(seaweed.port, request))
            self.send_response(answer.status)
            length = {"content-length": str(len(answer.body))}
            for name, value in {**length, **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on the terminal."""

    with serving(Handler) as endpoint:
        yield endpoint, requests


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The endpoint of a server in threads of this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _pass_on(port: int, request: Request) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {k: v for k, v in request.headers.items() if k not in ("connection", "expect")}
    connection.request(request.method, request.path, request.body, headers)
    with connection.getresponse() as response:
        body = response.read()
        names = {name.lower(): value for name, value in response.getheaders()}
    connection.close()
    for name in ("transfer-encoding", "connection", "server", "date"):
        names.pop(name, None)
    return Answer(response.status, names, body)


def refusal(status: int, code: str) -> Answer:
    """An error as S3 words it."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    return Answer(status, {"content-type": "application/xml"}, body)


def refuse(header: str, status: int, code: str) -> Habit:
    """Refuse every write that has a header."""

    def habit(request: Request, pass_on: PassOn) -> Answer:
        refused = request.method == "PUT" and header in request.headers
        return refusal(status, code) if refused else pass_on()

    return habit


def ignore(seaweed, header: str) -> Habit:
    """Write as if a header were not there."""

    def habit(request: Request, pass_on: PassOn) -> Answer:
        if request.method != "PUT" or header not in request.headers:
            return pass_on()
        key = request.path.partition("?")[0].removeprefix(f"/{BUCKET}/")
        prefix = "x-amz-meta-"
        marks = {k.removeprefix(prefix): v for k, v in request.headers.items() if prefix in k}
        done = seaweed.client().put_object(
            Bucket=BUCKET, Key=key, Body=request.body, Metadata=marks
        )
        return Answer(200, {"etag": done["ETag"]}, b"")

    return habit


def rewrite_etag(methods: set[str], change: Callable[[str], str | None]) -> Habit:
    """Change the ETag of answers, or drop it."""

    def habit(request: Request, pass_on: PassOn) -> Answer:
        answer = pass_on()
        etag = answer.headers.get("etag")
        if request.method not in methods or etag is None:
            return answer
        rest = {name: value for name, value in answer.headers.items() if name != "etag"}
        changed = change(etag)
        return answer._replace(headers={**rest, **({"etag": changed} if changed else {})})

    return habit


def answer_refused_writes(status: int) -> Habit:
    """Say a precondition's failure with another status and no words."""

    def habit(_request: Request, pass_on: PassOn) -> Answer:
        answer = pass_on()
        return Answer(status, {}, b"") if answer.status == 412 else answer

    return habit
