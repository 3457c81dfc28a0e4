"""What S3 has of its own: refusals in words, verified transfer, retries, parts left behind."""

import http.server
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from storage import s3_files
from storage.errors import HoldLost, StoreError
from storage.location import open_store
from storage.s3_client import S3Options, make_client
from tests.storage.places import BUCKET, S3Place

KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def first_contact(url: str, **options: object) -> StoreError:
    with pytest.raises(StoreError) as caught:
        open_store(url, options=S3Options(**options)).check_writable()  # pyright: ignore[reportArgumentType]
    return caught.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEYS[0]: "nobody-we-know"}, r"credentials were refused \(InvalidAccessKeyId\); set AWS_"),
        ({KEYS[1]: "not-the-secret"}, r"credentials were refused \(SignatureDoesNotMatch\)"),
        ({KEYS[0]: None, KEYS[1]: None}, "no credentials found; set AWS_ACCESS_KEY_ID"),
        ({"AWS_PROFILE": "no-such-profile"}, "the AWS profile that AWS_PROFILE names"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached .*check the endpoint"),
        ({"AWS_ENDPOINT_URL": "http://"}, "configuration cannot be used .*AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://x:99999"}, "configuration cannot be used|cannot be reached"),
        ({"AWS_REGION": "eu-west-1 "}, "configuration cannot be used .*AWS_REGION"),
        ({KEYS[1]: None}, "configuration cannot be used|no credentials found"),
        ({"AWS_ENDPOINT_URL": "ftp://127.0.0.1"}, "has to be an http:// or https:// address"),
        ({"AWS_ENDPOINT_URL": "http://u:p@127.0.0.1"}, "without a user name; credentials belong"),
    ],
)
def test_set_ups_that_are_wrong_are_told_in_words(
    seaweed, s3_environment, monkeypatch, change, message
):
    for name, value in change.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    error = first_contact(f"s3://{BUCKET}/x")
    assert error.__cause__ is None
    with pytest.raises(StoreError, match=message):
        raise error
    for secret in ("not-the-secret", seaweed.secret_key, "u:p@"):
        assert secret not in str(error)


def test_a_bucket_that_is_not_there(seaweed, s3_environment):
    assert "there is no bucket 'nobody-made-it'" in str(first_contact("s3://nobody-made-it/x"))


def test_tls_where_there_is_none(seaweed, s3_environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint.replace("http:", "https:"))
    assert "TLS failed; is it http://" in str(first_contact(f"s3://{BUCKET}/x"))


class Answer(http.server.BaseHTTPRequestHandler):
    """What AWS itself answers, word for word, where SeaweedFS has no such answer."""

    status: ClassVar[int]
    body: ClassVar[bytes]
    more: ClassVar[dict[str, str]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(self.status)
        for name, value in self.more.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def answering() -> Iterator[Callable[..., tuple[str, list[str]]]]:
    servers = []

    def start(status: int, code: str, **headers: str) -> tuple[str, list[str]]:
        body = f"<Error><Code>{code}</Code><Message>AKIASECRET said no</Message></Error>".encode()
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        fields = {"status": status, "body": body, "more": more, "asked": []}
        handler = type("ThisAnswer", (Answer,), fields)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", fields["asked"]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


REFUSALS = {
    "access denied": (403, "AccessDenied", {}, "access denied; these credentials may not list", 1),
    "clock skew": (403, "RequestTimeTooSkewed", {}, "this machine's clock is too far", 1),
    "region": (
        400, "AuthorizationHeaderMalformed", {"x_amz_bucket_region": "eu-west-3"},
        "is in another region, eu-west-3; set store.region in the recipe, or AWS_REGION", 1,
    ),
    "expired token": (400, "ExpiredToken", {}, r"credentials were refused \(ExpiredToken\)", 1),
    "full": (507, "InsufficientCapacity", {}, "no space left there", None),
    "slow down": (503, "SlowDown", {}, r"keeps failing \(SlowDown\) after many attempts", 3),
    "internal error": (500, "InternalError", {}, "keeps failing .InternalError.", 3),
    "unknown": (418, "Teapot", {}, r"the service refused to list \(Teapot\)", 1),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_told_in_words_and_only_transient_ones_asked_again(
    seaweed, s3_environment, answering, case
):
    status, code, headers, message, asked = REFUSALS[case]
    endpoint, requests = answering(status, code, **headers)
    error = first_contact(f"s3://{BUCKET}/x", endpoint=endpoint)
    with pytest.raises(StoreError, match=message):
        raise error
    assert "AKIASECRET" not in str(error)
    assert asked is None or len(requests) == asked


def test_something_else_than_s3_answers(seaweed, s3_environment, answering):
    class Page(Answer):
        status, body, more, asked = 200, b"<html>a web page", {}, []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    assert "does not speak S3" in str(first_contact(f"s3://{BUCKET}/x", endpoint=endpoint))
    server.shutdown()
    server.server_close()


def test_region_and_endpoint_come_from_the_recipe_before_the_environment(
    s3_environment, monkeypatch
):
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1111")
    client = make_client(S3Options())
    assert client.meta.region_name == "eu-central-1"
    assert client.meta.endpoint_url == "http://127.0.0.1:1111"
    client = make_client(S3Options("http://127.0.0.1:2222", "eu-west-1"))
    assert client.meta.region_name == "eu-west-1"
    assert client.meta.endpoint_url == "http://127.0.0.1:2222"


def test_what_is_sent_carries_its_sha256_which_the_service_keeps(seaweed, s3_place, tmp_path):
    backend = s3_place.open().backend
    source = tmp_path / "source"
    for name, size in (("small", 1000), ("large", 40 << 20)):
        source.write_bytes(bytes(size))
        backend.put_file(name, source)
        head = seaweed.client().head_object(
            Bucket=BUCKET, Key=f"{s3_place.url.rpartition('/')[2]}/{name}", ChecksumMode="ENABLED"
        )
        assert head["ChecksumSHA256"]


def test_an_upload_that_was_killed_leaves_parts_that_the_next_writer_removes(seaweed, s3_place):
    client, store = seaweed.client(), s3_place.open()
    prefix = s3_place.url.rpartition("/")[2]

    def unfinished() -> int:
        return len(client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", ()))

    for stage in ("policy", "features"):
        key = f"{prefix}/artifacts/{stage}/0123456789abcdef/data/model.safetensors"
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)
        client.upload_part(
            Bucket=BUCKET, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"half",
        )  # fmt: skip
    assert unfinished() == 2
    assert store.backend.sweep("", 3600) == 0  # in its grace period
    with store.hold("policy", "0123456789abcdef", None) as hold:
        assert hold is not None
        store.writer("policy", "0123456789abcdef", hold)
    assert unfinished() == 1
    assert store.backend.sweep("", 0) == 1
    assert unfinished() == 0


@pytest.mark.parametrize("size", [1000, 40 << 20])
def test_a_run_that_is_cut_off_in_an_upload_does_not_end_it(s3_place, tmp_path, size):
    """The successor's file stands; the one that lost its right raises before it writes over it."""
    backend = s3_place.open().backend
    s3_place.write("model", b"the successor's")
    source = tmp_path / "source"
    source.write_bytes(bytes(size))
    asked = []

    def lost() -> None:
        asked.append(True)
        raise HoldLost("another run took over")

    with pytest.raises(HoldLost):
        backend.put_file("model", source, still_ours=lost)
    assert asked
    assert s3_place.read("model") == b"the successor's"
    assert source.exists()


@pytest.mark.parametrize("size", [1000, 40 << 20])
def test_a_file_that_changes_while_it_is_sent_is_noticed(s3_place, tmp_path, monkeypatch, size):
    digests = s3_files._digests

    def and_then_it_changes(path):
        found = digests(path)
        with path.open("r+b") as stream:
            stream.seek(size // 2)
            stream.write(b"X")
        return found

    monkeypatch.setattr(s3_files, "_digests", and_then_it_changes)
    source = tmp_path / "source"
    source.write_bytes(bytes(size))
    with pytest.raises(StoreError, match="did not arrive whole.*not that of what was sent"):
        s3_place.open().backend.put_file("file", source)


def test_a_store_may_be_a_whole_bucket(seaweed, s3_environment):
    bucket = f"whole-{uuid.uuid4().hex[:8]}"
    seaweed.create_bucket(bucket)
    store = open_store(f"s3://{bucket}")
    store.backend.put("a/b", b"x")
    assert [entry.key for entry in store.backend.list("a")] == ["a/b"]
    assert [entry.key for entry in store.backend.list("")] == ["a/b"]


def test_two_stores_of_one_machine_share_no_work_in_progress(s3_environment, monkeypatch):
    folders = {open_store(f"s3://{BUCKET}/{prefix}").backend.scratch for prefix in ("one", "two")}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    folders.add(open_store(f"s3://{BUCKET}/one").backend.scratch)
    assert len(folders) == 3


def test_the_read_cache_holds_what_was_read(s3_place: S3Place, tmp_path: Path):
    backend = s3_place.open().backend
    source = tmp_path / "source"
    source.write_bytes(b"content")
    record = backend.put_file("a", source)
    path = backend.fetch("a", record)
    assert str(path).startswith(str(tmp_path / "cache"))
    s3_place.remove("a")
    # By content: another process, another key, even after the object is gone.
    assert s3_place.open().backend.fetch("b", record).read_bytes() == b"content"
