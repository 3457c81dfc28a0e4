"""S3 services with an odd habit: what works is used, what does not is named at the start."""

import http.server
import socket
import threading
import uuid

import pytest

from storage.errors import StoreError
from storage.location import open_store
from storage.s3_client import S3Options
from tests.storage.places import BUCKET
from tests.storage.services import (
    answer_refused_writes,
    ignore,
    refusal,
    refuse,
    rewrite_etag,
    service,
    serving,
)

READS, ALL = {"GET", "HEAD"}, {"GET", "HEAD", "PUT"}


def opened(place, endpoint):
    return open_store(place.url, options=S3Options(endpoint))


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (412, "PreconditionFailed"),
        (501, "NotImplemented"),
        (400, "InvalidArgument"),
        (400, "InvalidRequest"),
        (405, "MethodNotAllowed"),
        (304, "NotModified"),
        (404, "NoSuchKey"),
    ],
)
def test_a_condition_that_is_always_refused_is_found_at_the_start(
    seaweed, s3_place, header, status, code
):
    with service(seaweed, refuse(header.lower(), status, code)) as (endpoint, _):
        with pytest.raises(StoreError) as caught:
            opened(s3_place, endpoint).check_writable()
        message = f"bucket '{BUCKET}' at {endpoint} (Server: OddProxy) does not honour {header}: "
        assert str(caught.value).startswith(message)
        assert "Use a service that has them" in str(caught.value)
    assert s3_place.keys() == []


@pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
def test_a_condition_that_is_ignored_is_found_at_the_start(seaweed, s3_place, header):
    with (
        service(seaweed, ignore(seaweed, header.lower())) as (endpoint, _),
        pytest.raises(StoreError, match=f"does not honour {header}: it wrote over an object"),
    ):
        opened(s3_place, endpoint).check_writable()
    assert s3_place.keys() == []


def test_an_etag_that_no_write_has_is_found_at_the_start(seaweed, s3_place):
    habit = rewrite_etag(READS, lambda etag: f'{etag[:-1]}-gzip"')
    with (
        service(seaweed, habit) as (endpoint, _),
        pytest.raises(StoreError, match="If-Match: it refused the object's own ETag, .*-gzip"),
    ):
        opened(s3_place, endpoint).check_writable()
    assert s3_place.keys() == []


WORKING = {
    "as it should": rewrite_etag(set(), str),
    "ETag without quotes": rewrite_etag(ALL, lambda etag: etag.strip('"')),
    "weak ETag": rewrite_etag(ALL, lambda etag: f"W/{etag}"),
    "no ETag of writes": rewrite_etag({"PUT"}, lambda _: None),
    "304 for a refused write": answer_refused_writes(304),
    "no error document": answer_refused_writes(412),
}


@pytest.mark.parametrize("habit", WORKING)
def test_odd_services_with_conditional_writes_work(seaweed, s3_place, habit):
    with service(seaweed, WORKING[habit]) as (endpoint, requests):
        store = opened(s3_place, endpoint)
        store.check_writable()
        # The first contact, both conditions twice, what stands there, and the clean-up.
        methods = [request.method for request in requests]
        assert methods == ["GET", "PUT", "PUT", "PUT", "GET", "PUT", "DELETE"]
        assert s3_place.keys() == []
        backend = store.backend
        assert backend.create("a", b"1")
        assert not backend.create("a", b"2")
        found = backend.read_with_etag("a")
        assert found is not None
        data, etag = found
        assert data == b"1"
        assert backend.replace("a", b"3", etag)
        assert not backend.replace("a", b"4", etag)
        assert not backend.replace("gone", b"4", etag)
        with store.hold("policy", "0123456789abcdef", None) as hold:
            assert hold is not None
            hold._renew()
            hold.check()
    assert s3_place.read("a") == b"3"


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidRequest")])
def test_a_checksum_that_is_refused_is_named(seaweed, s3_place, status, code):
    with (
        service(seaweed, refuse("x-amz-checksum-sha256", status, code)) as (endpoint, _),
        pytest.raises(StoreError, match=f"with the header x-amz-checksum-sha256 .{code}."),
    ):
        opened(s3_place, endpoint).check_writable()
    assert s3_place.keys() == []


def test_writes_that_are_refused_for_another_reason_blame_no_header(seaweed, s3_place):
    with (
        service(seaweed, refuse("host", 400, "InvalidRequest")) as (endpoint, _),
        pytest.raises(StoreError, match=r"the service refused to write \(InvalidRequest\)"),
    ):
        opened(s3_place, endpoint).check_writable()


PAGE = b"<html><head><title>x</title></head><body>a web page</body></html>"
OTHERS = {
    "a page": (200, {"Content-Type": "text/html; charset=utf-8"}, PAGE, "(200 text/html)"),
    "a page, no XML": (200, {"Content-Type": "text/html"}, b"<br>&nbsp;", "(200 text/html)"),
    "nothing": (200, {}, b"", "(200)"),
    "JSON": (200, {"Content-Type": "application/json"}, b"{}", "(200 application/json)"),
    "not found": (404, {"Content-Type": "text/html"}, PAGE, "(404 text/html)"),
    "JSON not found": (404, {}, b'{"detail":"Not Found"}', "(404)"),
    "not found, no words": (404, {}, b"", "(404)"),
    "password": (401, {"WWW-Authenticate": "Basic"}, PAGE, "(401)"),
    "forbidden": (403, {"Content-Type": "text/html"}, PAGE, "(403 text/html)"),
    "login": (302, {"Location": "https://login.example/?s=SECRET"}, b"", "to login.example)"),
    "moved": (301, {"Location": "https://u:SECRET@www.example/"}, PAGE, "to www.example)"),
    "TLS port": (400, {}, b"Client sent an HTTP request to an HTTPS server.", "is it https://"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("first", ["read", "write"])
def test_what_is_not_s3_is_not_believed(s3_place, other, first):
    status, headers, body, message = OTHERS[other]
    asked = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.command)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_DELETE = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    with serving(Other) as endpoint:
        store = opened(s3_place, endpoint)
        read, write = lambda: store.backend.read_with_etag("refs/x"), store.check_writable
        with pytest.raises(StoreError) as caught:
            (read if first == "read" else write)()
    text = str(caught.value)
    assert "what answers there does not speak S3 (" in text
    assert message.lower() in text.lower()
    assert "Check AWS_ENDPOINT_URL, or store.endpoint" in text
    assert "SECRET" not in text
    assert set(asked) == {"GET"}  # nothing was written


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (b"", "accepts connections there and does not answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x50", "Is it https:// rather than http://?"),
    ],
)
def test_a_port_that_speaks_no_http(s3_place, greeting, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def greet() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                held.append(connection)
                if greeting:
                    connection.recv(65536)
                    connection.sendall(greeting)
                    connection.close()

        threading.Thread(target=greet, daemon=True).start()
        options = S3Options(f"http://127.0.0.1:{server.getsockname()[1]}", read_timeout=0.3)
        with pytest.raises(StoreError) as caught:
            open_store(s3_place.url, options=options).check_writable()
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()
    assert message in str(caught.value)
    assert "Check AWS_ENDPOINT_URL" in str(caught.value)


def test_a_bucket_that_is_deleted_in_mid_run_is_told_in_words(seaweed, s3_environment, tmp_path):
    def missing(request, pass_on):
        is_head = request.method == "HEAD"
        return refusal(404, "NoSuchKey")._replace(body=b"") if is_head else pass_on()

    bucket = f"deleted-{uuid.uuid4().hex[:8]}"
    seaweed.create_bucket(bucket)
    with service(seaweed, missing) as (endpoint, _):
        backend = open_store(f"s3://{bucket}/x", options=S3Options(endpoint)).backend
        source = tmp_path / "source"
        source.write_bytes(b"x")
        with pytest.raises(StoreError, match=r"finds nothing to read \(404\). The bucket, or"):
            backend.put_file("file", source)
        assert source.exists()
        client = seaweed.client()
        client.delete_object(Bucket=bucket, Key="x/file")
        client.delete_bucket(Bucket=bucket)
        source.write_bytes(b"x")
        calls = [
            lambda: list(backend.list("")),
            lambda: backend.sweep("", 0),
            lambda: backend.put_file("file", source),
            lambda: backend.create("a", b"1"),
            lambda: backend.put("a", b"1"),
            lambda: backend.read_with_etag("a"),
            lambda: backend.check_writable("a"),
        ]
        for call in calls:
            with pytest.raises(StoreError, match=f"{bucket}' at {endpoint}"):
                call()
