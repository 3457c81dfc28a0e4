"""Files at https:// and s3:// addresses, from a real web server and a real object store."""

import hashlib
import json
import logging
import os
import ssl
import subprocess
import sys
import time
import uuid

import pytest

from fpo_core.data.sources import count_rows, identify_data, read_rows
from fpo_core.data.sources.remote import fetch
from fpo_core.errors import FPOError
from fpo_core.progress import watched
from tests.fpo_core.data.web_server import Web, serving
from tests.fpo_core.data.writing import ROWS, WRITERS, values
from tests.object_store import BUCKET

DATA = WRITERS["d.jsonl"](ROWS)
SECRET = "X-Amz-Signature=abc123secret"  # noqa: S105 - made up


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "data"


@pytest.fixture
def web():
    web = Web()
    web.files["/d.jsonl"] = DATA
    return web


@pytest.fixture
def address(web):
    with serving(web) as address:
        yield address


def refused(source):
    with pytest.raises(FPOError) as told:
        identify_data(source)
    assert told.value.__context__ is None  # no library's error, which names the whole address
    return str(told.value)


def test_a_file_is_identified_by_its_content_and_read(address, web):
    source = f"{address}/d.jsonl"
    found = identify_data(source)
    assert found.value == f"file:{hashlib.sha256(DATA).hexdigest()}"
    web.files.clear()  # what was identified is read
    rows = list(read_rows(source, found.files))
    assert [row.value for row in rows] == ROWS
    assert rows[2].where == f"{source}, line 3"
    assert count_rows(f"{source}[1:]", found.files) == 2


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_is_read_from_an_address(address, web, name):
    web.files[f"/{name}.gz"] = WRITERS[name](ROWS)
    web.files[f"/{name}"] = WRITERS[name](ROWS)
    assert values(f"{address}/{name}?download=true") == ROWS
    assert values(f"{address}/{name}[:2]") == ROWS[:2]


def test_an_unchanged_file_is_fetched_once(address, web):
    source = f"{address}/d.jsonl"
    values_of_both = [identify_data(source).value, identify_data(source).value]
    assert web.fetched() == 1
    web.files["/d.jsonl"] = DATA + DATA[: DATA.index(b"\n") + 1]
    assert identify_data(source).value not in values_of_both
    assert web.fetched() == 1
    web.files["/copy.jsonl"] = DATA
    assert identify_data(f"{address}/copy.jsonl").value == values_of_both[0]


def test_a_server_that_marks_no_versions_is_asked_each_time(address, web):
    source = f"{address}/d.jsonl"
    for marks, fetched in (({"ETag"}, 1), ({"Last-Modified"}, 1), (set(), 2)):
        web.marks = marks
        web.files["/d.jsonl"] += b"\n"
        web.fetched()
        identify_data(source)
        identify_data(source)
        assert web.fetched() >= fetched
        identify_data(source)
        assert (web.fetched() > 0) == (fetched == 2), marks
    # A time of this second says little: the file may change again within it.
    web.marks, web.changed = {"Last-Modified"}, time.time()
    web.files["/new.jsonl"] = DATA
    first = identify_data(f"{address}/new.jsonl").value
    web.files["/new.jsonl"] = DATA.replace(b"Eight", b"Seven")
    assert identify_data(f"{address}/new.jsonl").value != first


def test_without_the_server_the_last_copy_is_used_and_said(web, caplog):
    with serving(web) as address:
        source = f"{address}/d.jsonl?{SECRET}"
        before = identify_data(source)
        web.status = 503
        assert identify_data(source) == before
        web.status = 200
    caplog.clear()
    assert identify_data(source) == before
    assert values(source) == ROWS
    (told, *_) = [one for one in caplog.records if one.levelno == logging.WARNING]
    assert told.getMessage() == (
        f"data {address}/d.jsonl: the server cannot be reached. Check the "
        f"network and the address. The last copy is used"
    )
    assert "the server cannot be reached" in refused(f"{address}/other.jsonl")


def test_a_damaged_copy_is_fetched_again(address, web, cache):
    source = f"{address}/d.jsonl"
    found = identify_data(source)
    copy = cache / hashlib.sha256(DATA).hexdigest()
    copy.write_bytes(DATA.replace(b"Eight", b"Seven!"))
    assert identify_data(source) == found
    assert copy.read_bytes() == DATA
    for record in (cache / "addresses").iterdir():
        record.write_text('{"state": [')
    assert identify_data(source) == found


def test_no_signature_or_password_is_stored_or_shown(address, web, cache, caplog):
    caplog.set_level(logging.DEBUG, "fpo")
    signed = f"{address}/d.jsonl?{SECRET}".replace("://", "://ann:pass123word@")
    web.head_status = 403  # signed for GET only
    rows = list(read_rows(signed))
    assert [row.value for row in rows] == ROWS
    assert rows[0].where == f"{address}/d.jsonl, line 1"
    assert any("Authorization" in headers for headers in web.headers)
    told = [refused(signed.replace("/d.jsonl", "/none.jsonl"))]
    web.status = 403
    told.append(refused(signed))
    web.files["/bad.jsonl"], web.status = b"{", 200
    with pytest.raises(FPOError) as error:
        list(read_rows(signed.replace("/d.", "/bad.")))
    told += [str(error.value), caplog.text]
    told += [file.read_text() for file in cache.rglob("*.json")]
    for text in told:
        assert "secret" not in text
        assert "pass123word" not in text


def test_what_cannot_be_fetched_is_told_with_the_remedy(address, web):
    assert refused(f"{address}/x.jsonl?a=b") == (
        f"data '{address}/x.jsonl': it does not exist. Check the address"
    )
    for status, message in (
        (401, "access is denied (HTTP 401)"),
        (403, "a signed address has expired"),
        (410, "it does not exist"),
        (429, "HTTP 429. Try again later"),
        (500, "HTTP 500"),
    ):
        web.status = status
        assert message in refused(f"{address}/d.jsonl")
    web.status = 200
    assert "it redirects too often" in refused(f"{address}/again/d.jsonl")
    assert values(f"{address}/to/d.jsonl") == ROWS
    assert "cannot be reached" in refused("http://127.0.0.1:9/d.jsonl")
    assert "cannot be reached" in refused("https://no-such-host.invalid/d.jsonl")
    assert "use https:// or s3://" in refused("gs://bucket/d.jsonl")
    web.cut_off = 20
    assert "the connection broke off" in refused(f"{address}/d.jsonl")
    web.cut_off = 0
    web.files["/page.jsonl"] = b"<!doctype html><html>Log in"
    with pytest.raises(FPOError, match="is a web page, not data"):
        list(read_rows(f"{address}/page.jsonl"))


def test_an_unknown_certificate_is_refused(web, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    with serving(web, tls) as address:
        assert "certificate cannot be verified. Set SSL_CERT_FILE" in refused(f"{address}/d.jsonl")
        # aiohttp reads the authorities when it is imported.
        told = subprocess.check_output(
            [sys.executable, "-m", "tests.hub_client", f"{address}/d.jsonl"],
            env={**os.environ, "SSL_CERT_FILE": str(certificate)},
        )
    (found,) = json.loads(told)
    assert [answer for answer, _ in found["pairs"]] == [row["chosen"] for row in ROWS]


def test_a_cache_that_cannot_be_written(address, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPO_CACHE", str(tmp_path / "file"))
    assert "it cannot be stored" in refused(f"{address}/d.jsonl")


def test_a_big_download_shows_how_far_it_is(address, web):
    web.files["/big.jsonl"] = DATA * 120_000
    seen = []
    with watched(lambda progress: seen.append((progress.label, progress.done, progress.total))):
        identify_data(f"{address}/big.jsonl")
    label, done, total = seen[-1]
    assert label == f"fetching {address}/big.jsonl"
    assert done == total == len(web.files["/big.jsonl"]) // 1_000_000
    assert [one for _, one, _ in seen] == sorted(one for _, one, _ in seen)


@pytest.fixture
def bucket(seaweed, monkeypatch):
    """A folder of its own in a bucket, with the environment that leads there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    prefix = f"data-{uuid.uuid4().hex}"

    def put(name, data):
        seaweed.client().put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
        return f"s3://{BUCKET}/{prefix}/{name}"

    return put


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "d.arrow"])
def test_a_file_of_an_object_store(bucket, name):
    source = bucket(name, WRITERS[name](ROWS))
    found = identify_data(source)
    assert found.value == f"file:{hashlib.sha256(WRITERS[name](ROWS)).hexdigest()}"
    rows = list(read_rows(source, found.files))
    assert [row.value for row in rows] == ROWS
    assert rows[0].where.startswith(f"{source}, ")
    assert values(f"{source}[1:2]") == ROWS[1:2]


def test_an_object_is_fetched_again_when_it_changes(bucket, cache):
    source = bucket("a name (1).jsonl", DATA)
    first = identify_data(source)
    (copy,) = (path for path in cache.iterdir() if path.is_file())
    times = copy.stat().st_mtime_ns
    assert identify_data(source) == first
    assert copy.stat().st_mtime_ns == times
    bucket("a name (1).jsonl", DATA.replace(b"Eight", b"Seven"))  # same size, same second
    assert identify_data(source).value != first.value


def test_a_pattern_of_objects(bucket):
    names = ["part/b.jsonl", "part/a.jsonl", "part/README.md", "part/more/c.jsonl"]
    places = [bucket(name, DATA) for name in names]
    prefix = places[0].removesuffix("part/b.jsonl")
    rows = list(read_rows(f"{prefix}part/*.jsonl"))
    assert [row.where for row in rows[::3]] == [
        f"{prefix}part/a.jsonl, line 1",
        f"{prefix}part/b.jsonl, line 1",
    ]
    assert len(values(f"{prefix}part/**/*.jsonl")) == 9
    flat, deep = (identify_data(f"{prefix}part/{end}").value for end in ("*.jsonl", "**/*.jsonl"))
    assert flat.startswith("files:")
    assert flat != deep
    assert "matches no file" in refused(f"{prefix}none/*.jsonl")


def test_objects_that_cannot_be_had(bucket, seaweed, monkeypatch):
    source = bucket("d.jsonl", DATA)
    before = identify_data(source)
    assert "it does not exist" in refused(source.replace("d.jsonl", "e.jsonl"))
    assert "it does not exist" in refused("s3://no-such-bucket-here/d.jsonl")
    assert "it is a folder. Give a file, or a pattern" in refused(source.removesuffix("/d.jsonl"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-key")
    denied = refused(source)
    assert "access is denied. Check AWS_ACCESS_KEY_ID" in denied
    assert "wrong-secret-key" not in denied
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert identify_data(source) == before
    assert "the server cannot be reached" in refused(source.replace("d.jsonl", "e.jsonl"))


def test_the_files_of_an_address_are_plain_values(address):
    found = fetch(f"{address}/d.jsonl")
    assert found.alone
    assert json.loads(json.dumps(found.digests)) == [hashlib.sha256(DATA).hexdigest()]
