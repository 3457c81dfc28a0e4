"""The part of the model hub's HTTP interface that reading datasets and SAEs uses, on loopback."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_made_up_for_tests"  # noqa: S105 - opens the gated datasets of this server


class Hub:
    """Repositories: branches that point to commits, commits that hold files."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.down = False  # answers 503
        self.only_lists = False  # has the files' names and nothing else
        self.requests: list[str] = []

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files on a branch; returns the commit."""
        parts = [(path, _oid(data)) for path, data in sorted(files.items())]
        commit = _oid(json.dumps(parts).encode())
        self.commits[name, commit] = files
        self.branches[name, branch] = commit
        return commit

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request."""
        self.requests.append(path)
        if self.down:
            return 503, {}, b""
        api = path.startswith("/api/")
        place = path.removeprefix("/api").removeprefix("/datasets").removeprefix("/")
        owner, repo, action, *rest = place.split("/")
        name = f"{owner}/{repo}"
        if not any(known == name for known, _ in self.branches):
            return _error(401, "RepoNotFound")
        asked = unquote(rest[0])
        commit = self.branches.get((name, asked), asked)
        files = self.commits.get((name, commit))
        if files is None:
            return _error(404, "RevisionNotFound")
        if self.only_lists and action != "revision":
            return 404, {}, b""
        if action == "resolve":
            return self._file(name, commit, files, "/".join(map(unquote, rest[1:])), token)
        assert api
        if action == "revision":
            siblings = [{"rfilename": file} for file in files]
            return _json({"id": name, "sha": commit, "siblings": siblings, "tags": []})
        assert action == "tree"
        return _json(
            [
                {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
                for file, data in files.items()
            ]
        )

    def _file(
        self, name: str, commit: str, files: dict[str, bytes], path: str, token: str | None
    ) -> tuple[int, dict[str, str], bytes]:
        if name in self.gated and token != f"Bearer {TOKEN}":
            return _error(401 if token is None else 403, "GatedRepo")
        if path not in files:
            return _error(404, "EntryNotFound")
        return 200, {"ETag": f'"{_oid(files[path])}"', "X-Repo-Commit": commit}, files[path]


def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve a hub while the context is open; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = hub.answer(
                urlsplit(self.path).path, self.headers.get("Authorization")
            )
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
