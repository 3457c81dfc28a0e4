"""How packs are pulled: from a server on loopback, checked, pinned and kept."""

import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import yaml

from fpo_core.bench import pull
from fpo_core.bench.pack import PACK_FILE, PackFile, PackSettings, load_pack, packs_folder
from fpo_core.bench.pull import is_pulled, known_pack, pull_pack
from fpo_core.errors import FPOError, UsageError
from tests.fpo_core.packs import arena_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def arena(tmp_path):
    return arena_folder(tmp_path / "arena")


@contextmanager
def serving(files):
    """A web server on loopback; yields its address and the list of paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, body, promised = files.get(self.path, (404, b"", 0))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body.decode())
                body = b""
            self.send_header("Content-Length", str(len(body) + promised))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sourced(address, contents, *, unpinned=()):
    """An Arena-Hard pack at this address."""
    names = {"questions": "question.jsonl", "baseline": "gpt-4-0314.jsonl",
             "judge": "judge_config.yaml"}  # fmt: skip
    files = {
        role: PackFile(
            path=name, url=f"{address}/{name}",
            sha256=None if role in unpinned else hashlib.sha256(contents[name]).hexdigest(),
        )
        for role, name in names.items()
    }  # fmt: skip
    return PackSettings(name="served", kind="arena_hard", files=files, licence="none")


@pytest.fixture
def contents(arena):
    return {file.name: file.read_bytes() for file in arena.iterdir()}


def test_pulling_fetches_checks_and_keeps(contents):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    files["/question.jsonl"] = (302, b"/moved", 0)
    files["/moved"] = (200, contents["question.jsonl"], 0)
    with serving(files) as (address, asked):
        known = sourced(address, contents)
        told = []
        pulled = pull_pack(known, told.append)
        assert len(pulled.fetched) == 3
        assert told == [f"fetching {address}/{name}" for name in pulled.fetched]
        assert is_pulled("served")
        assert load_pack("served") == pulled.pack
        assert {file.read_bytes() for file in pulled.pack.files.values()} == set(contents.values())
        count = len(asked)
        (packs_folder() / "served" / PACK_FILE).unlink()  # as after a pull that was interrupted
        pulled.pack.files["judge"].unlink()
        again = pull_pack(known)
        assert (again.fetched, len(again.kept)) == (("judge_config.yaml",), 2)
        assert len(asked) == count + 1


def test_what_had_no_pin_is_pinned_as_it_came(contents):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    with serving(files) as (address, _):
        known = sourced(address, contents, unpinned=("judge",))
        judge = pull_pack(known).pack.files["judge"]
        settings = yaml.safe_load((packs_folder() / "served" / PACK_FILE).read_text())
        judged = hashlib.sha256(contents["judge_config.yaml"]).hexdigest()
        assert settings["files"]["judge"]["sha256"] == judged
        judge.write_bytes(contents["judge_config.yaml"] + b"# changed\n")
        with pytest.raises(FPOError, match="its sha256 is"):
            load_pack("served")
        assert pull_pack(known).fetched == ("judge_config.yaml",)
        files["/judge_config.yaml"] = (200, b"max_tokens: 1", 0)
        judge.unlink()
        with pytest.raises(FPOError, match="what came has the sha256"):
            pull_pack(known)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, b"something else", 0), "what came has the sha256 .* it was thrown away"),
        ((404, b"", 0), r"could not be fetched \(HTTPError: HTTP Error 404"),
        ((200, b"part", 100), "broke off after 4 of 104 bytes"),
    ],
)
def test_a_source_that_fails(contents, answer, said):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    with serving({**files, "/gpt-4-0314.jsonl": answer}) as (address, _):
        known = sourced(address, contents)
        with pytest.raises(FPOError, match=said) as caught:
            pull_pack(known)
    folder = packs_folder() / "served"
    assert f"put it there as {folder / 'gpt-4-0314.jsonl'} by hand" in str(caught.value)
    assert [file.name for file in folder.iterdir()] == ["question.jsonl"]
    assert not is_pulled("served")
    for name, body in contents.items():  # by hand, with the server gone
        (folder / name).write_bytes(body)
    assert pull_pack(known).fetched == ()


def test_only_the_web_is_fetched_from(contents, tmp_path):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    (tmp_path / "secret").write_text("secret")
    files["/question.jsonl"] = (302, f"file://{tmp_path}/secret".encode(), 0)
    with serving(files) as (address, _), pytest.raises(FPOError, match="could not be fetched"):
        pull_pack(sourced(address, contents, unpinned=("questions",)))


def test_what_was_pulled_and_cannot_be_read_is_no_pack(contents):
    files = {f"/{name}": (200, body, 0) for name, body in contents.items()}
    files["/judge_config.yaml"] = (200, b"<html>log in first</html>", 0)
    with (
        serving(files) as (address, _),
        pytest.raises(FPOError, match=r"judge_config\.yaml: holds str.*remove it"),
    ):
        pull_pack(sourced(address, contents, unpinned=("judge",)))
    assert not is_pulled("served")


def test_a_name_that_is_not_known():
    with pytest.raises(UsageError, match="there are alpaca-eval-1, .*mt-bench"):
        known_pack("mtbench")
    assert known_pack("mt-bench") is pull.KNOWN_PACKS["mt-bench"]
