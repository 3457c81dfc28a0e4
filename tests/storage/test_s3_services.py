"""S3 services with an odd habit: what works is used, what does not is named at the start."""

import pytest

from storage.errors import StoreError
from storage.location import open_store
from storage.s3_client import S3Options
from tests.storage.places import BUCKET
from tests.storage.services import (
    answer_refused_writes,
    ignore,
    refuse,
    rewrite_etag,
    service,
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
