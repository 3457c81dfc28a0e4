"""The proxy: nothing is changed without a fault, and each fault is what it claims to be."""

import io
import threading
import time
from collections import Counter

import numpy as np
import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ReadTimeoutError,
    ResponseStreamingError,
)

from benchmarks.faults.chance import FAULTS, Chance
from benchmarks.faults.proxy import FaultyProxy
from tests.faults.plain import different_bytes, raw
from tests.object_store import BUCKET

MEGABYTE = 1024 * 1024
BODY = np.random.default_rng(1).bytes(300_000)
STALL = 300  # seconds: longer than a busy machine takes for anything here
# Both ways in which boto3 sends a body: at once, and after the server's 100 Continue.
SENT = pytest.mark.parametrize("sent", [bytearray, bytes], ids=["at once", "after leave"])


def read(client, key: str) -> bytes:
    return client.get_object(Bucket=BUCKET, Key=key)["Body"].read()


def keys(client, prefix: str = "") -> list[str]:
    answer = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for entry in answer.get("Contents", [])]


def seed_of_stall(in_body: bool) -> int:
    return next(n for n in range(100) if Chance({"stall": 1}, n, 0).draw().in_body == in_body)


@SENT
def test_without_faults_objects_pass_unchanged(client, direct, proxy, sent):
    client.put_object(Bucket=BUCKET, Key="clean/a", Body=sent(BODY), ChecksumAlgorithm="SHA256")
    client.put_object(Bucket=BUCKET, Key="clean/empty", Body=sent(b""))
    assert read(client, "clean/a") == read(direct, "clean/a") == BODY
    assert read(client, "clean/empty") == b""
    part = client.get_object(Bucket=BUCKET, Key="clean/a", Range="bytes=7-1006")
    assert part["Body"].read() == BODY[7:1007]
    assert client.head_object(Bucket=BUCKET, Key="clean/a")["ContentLength"] == len(BODY)
    assert keys(client, "clean/") == ["clean/a", "clean/empty"]
    with pytest.raises(ClientError, match="PreconditionFailed"):
        client.put_object(Bucket=BUCKET, Key="clean/a", Body=sent(BODY), IfNoneMatch="*")
    for key in ("clean/a", "clean/empty"):
        client.delete_object(Bucket=BUCKET, Key=key)
    with pytest.raises(ClientError, match="404"):
        client.head_object(Bucket=BUCKET, Key="clean/a")
    assert keys(client, "clean/") == []
    assert proxy.counts == Counter()
    assert proxy.requests >= 11


@SENT
def test_without_faults_a_connection_is_kept(client, proxy, sent):
    for n in range(40):
        client.put_object(Bucket=BUCKET, Key="clean/kept", Body=sent(BODY[:n]))
        assert read(client, "clean/kept") == BODY[:n]
        with pytest.raises(ClientError, match="PreconditionFailed"):
            client.put_object(Bucket=BUCKET, Key="clean/kept", Body=sent(BODY), IfNoneMatch="*")
    assert len(proxy._open) == 1


def test_without_faults_a_multipart_upload_passes_unchanged(client, direct):
    body = np.random.default_rng(2).bytes(11 * MEGABYTE + 1)
    parts = TransferConfig(multipart_threshold=5 * MEGABYTE, multipart_chunksize=5 * MEGABYTE)
    client.upload_fileobj(io.BytesIO(body), BUCKET, "clean/parts", Config=parts)
    assert direct.head_object(Bucket=BUCKET, Key="clean/parts")["ETag"].endswith('-3"')
    assert read(client, "clean/parts") == body


def test_a_chunked_request_body_passes_unchanged(client, direct, proxy):
    where = {"Bucket": BUCKET, "Key": "clean/chunked"}
    address = client.generate_presigned_url("put_object", Params=where)
    headers = {"Transfer-Encoding": "chunked"}
    pieces = iter([BODY[:10], BODY[10:200_000], BODY[200_000:]])
    status, _ = raw(proxy, "PUT", address, body=pieces, headers=headers, encode_chunked=True)
    assert status == 200
    assert read(direct, "clean/chunked") == BODY


@SENT
@pytest.mark.parametrize(
    ("fault", "code", "status"),
    [("error_500", "InternalError", 500), ("slow_down_503", "SlowDown", 503)],
)
def test_an_error_is_answered_and_the_server_sees_nothing(
    client, direct, proxy, sent, fault, code, status
):
    proxy.faults = {fault: 1}
    key = f"{fault}/{sent.__name__}"
    with pytest.raises(ClientError) as caught:
        client.put_object(Bucket=BUCKET, Key=key, Body=sent(BODY))
    assert caught.value.response["Error"]["Code"] == code
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    with pytest.raises(ClientError, match=str(status)):
        client.head_object(Bucket=BUCKET, Key=key)
    assert proxy.counts == {fault: 2}
    assert keys(direct, fault + "/" + sent.__name__) == []
    proxy.faults = {}
    client.put_object(Bucket=BUCKET, Key=key, Body=sent(BODY))  # the connection is in step
    assert read(direct, key) == BODY


@SENT
@pytest.mark.parametrize(("fault", "is_done"), [("reset_before", False), ("reset_after", True)])
def test_a_reset_is_seen_and_what_the_server_did(client, direct, proxy, sent, fault, is_done):
    key = f"{fault}/{sent.__name__}"
    proxy.faults = {fault: 1}
    with pytest.raises(ConnectionClosedError):
        client.put_object(Bucket=BUCKET, Key=key, Body=sent(BODY))
    assert proxy.counts == {fault: 1}
    with pytest.raises(ConnectionResetError):
        raw(proxy, "GET", f"{proxy.endpoint}/{BUCKET}")
    assert proxy.counts == {fault: 2}
    assert keys(direct, key) == ([key] if is_done else [])
    if is_done:
        assert read(direct, key) == BODY


def test_a_reset_hides_a_delete_and_a_completed_upload(client, direct, proxy):
    direct.put_object(Bucket=BUCKET, Key="hidden/gone", Body=b"x")
    where = {"Bucket": BUCKET, "Key": "hidden/parts"}
    upload = {**where, "UploadId": direct.create_multipart_upload(**where)["UploadId"]}
    part = direct.upload_part(**upload, PartNumber=1, Body=BODY)
    proxy.faults = {"reset_after": 1}
    with pytest.raises(ConnectionClosedError):
        client.delete_object(Bucket=BUCKET, Key="hidden/gone")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    with pytest.raises(ConnectionClosedError):
        client.complete_multipart_upload(**upload, MultipartUpload=parts)
    assert keys(direct, "hidden/") == ["hidden/parts"]
    assert read(direct, "hidden/parts") == BODY


def test_a_stall_before_the_answer(seaweed, connect, direct):
    faults = {"stall": 1.0}
    seed = seed_of_stall(in_body=False)
    began = time.monotonic()
    with FaultyProxy("127.0.0.1", seaweed.port, faults, seed, stall_seconds=STALL) as proxy:
        with pytest.raises(ReadTimeoutError):
            connect(proxy, read_timeout=0.5).put_object(Bucket=BUCKET, Key="stall/a", Body=BODY)
        assert proxy.counts == {"stall": 1}
        assert keys(direct, "stall/") == ["stall/a"]
    assert time.monotonic() - began < STALL  # the proxy's end ends a stall


def test_a_stall_in_a_body(seaweed, connect, direct):
    bodies: list[bytes] = []
    direct.put_object(Bucket=BUCKET, Key="stall/body", Body=BODY)
    seed = seed_of_stall(in_body=True)
    with FaultyProxy("127.0.0.1", seaweed.port, {"stall": 1}, seed, stall_seconds=STALL) as proxy:
        body = connect(proxy).get_object(Bucket=BUCKET, Key="stall/body")["Body"]
        reader = threading.Thread(target=lambda: bodies.append(body.read()))
        reader.start()
        reader.join(0.5)
        assert reader.is_alive()  # the head came, and the body does not
        assert proxy.counts == {"stall": 1}
    reader.join()
    assert bodies == [BODY]  # the proxy's end ends a stall


def test_a_stall_ends(seaweed, connect, direct):
    direct.put_object(Bucket=BUCKET, Key="stall/short", Body=BODY)
    seed = seed_of_stall(in_body=True)
    with FaultyProxy("127.0.0.1", seaweed.port, {"stall": 1}, seed, stall_seconds=0.5) as proxy:
        began = time.monotonic()
        assert read(connect(proxy), "stall/short") == BODY
        assert time.monotonic() - began >= 0.5
        assert proxy.counts == {"stall": 1}


def test_a_truncated_answer(client, direct, proxy):
    direct.put_object(Bucket=BUCKET, Key="truncated/a", Body=BODY)
    proxy.faults = {"truncated": 1}
    with pytest.raises(ResponseStreamingError, match="IncompleteRead"):
        read(client, "truncated/a")
    with pytest.raises((BotoCoreError, ClientError)):
        keys(client, "truncated/")
    assert proxy.counts == {"truncated": 2}
    client.head_object(Bucket=BUCKET, Key="truncated/a")  # nothing to cut
    assert proxy.counts == {"truncated": 2}


def test_a_wrong_response_is_an_object_with_one_other_byte(client, direct, proxy):
    direct.put_object(Bucket=BUCKET, Key="wrong/response", Body=BODY)
    proxy.faults = {"wrong_response": 1}
    assert keys(client, "wrong/response") == ["wrong/response"]
    with pytest.raises(ClientError, match="NoSuchKey"):
        read(client, "wrong/nothing")
    assert proxy.counts == Counter()
    assert different_bytes(read(client, "wrong/response"), BODY) == 1
    assert proxy.counts == {"wrong_response": 1}


def test_wrong_xml_is_an_answer_with_one_other_byte(client, direct, proxy):
    direct.put_object(Bucket=BUCKET, Key="wrong/xml", Body=BODY)
    where = {"Bucket": BUCKET, "Prefix": "wrong/xml"}
    address = client.generate_presigned_url("list_objects_v2", Params=where)
    right = raw(proxy, "GET", address)
    proxy.faults = {"wrong_xml": 1}
    wrong = raw(proxy, "GET", address)
    assert wrong[0] == right[0] == 200
    assert different_bytes(wrong[1], right[1]) == 1
    assert read(client, "wrong/xml") == BODY
    assert proxy.counts == {"wrong_xml": 1}


@SENT
def test_a_wrong_request_is_a_body_with_one_other_byte(client, direct, proxy, sent):
    key = f"wrong/request-{sent.__name__}"
    proxy.faults = {"wrong_request": 1}
    with pytest.raises(ClientError, match="BadDigest"):
        client.put_object(Bucket=BUCKET, Key=key, Body=sent(BODY), ChecksumAlgorithm="SHA256")
    assert keys(direct, key) == []
    # Without a checksum this server takes it, though the signature covers the body's hash.
    client.put_object(Bucket=BUCKET, Key=key, Body=sent(BODY))
    assert different_bytes(read(client, key), BODY) == 1
    assert proxy.counts == {"wrong_request": 2}


def test_a_seed_means_one_sequence_of_faults(seaweed, connect):
    def seen(seed: int) -> list[str]:
        faults = {"error_500": 0.3, "reset_before": 0.3}
        with FaultyProxy("127.0.0.1", seaweed.port, faults, seed) as proxy:
            client = connect(proxy)
            return [outcome(keys, client) for _ in range(30)]

    assert seen(1) == seen(1) != seen(2)
    assert set(seen(1)) == {"", "error_500", "reset_before"}


def outcome(call, *arguments, **named) -> str:
    """The fault that a call shows."""
    try:
        call(*arguments, **named)
    except ClientError as error:
        return {"InternalError": "error_500"}.get(error.response["Error"]["Code"], str(error))
    except ConnectionClosedError:
        return "reset_before"
    return ""


def test_counts_are_right_with_many_connections_at_once(connect, direct, proxy):
    proxy.faults = {"error_500": 0.25, "reset_before": 0.25}

    def work(worker: int) -> None:
        client = connect(proxy)
        for n in range(15):
            key = f"many/{worker}/{n:02}"
            results.append((key, outcome(client.put_object, Bucket=BUCKET, Key=key, Body=BODY)))

    results: list[tuple[str, str]] = []
    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seen = Counter(fault for _, fault in results)
    assert proxy.requests == len(results) == 60
    assert proxy.counts == {fault: seen[fault] for fault in ("error_500", "reset_before")}
    assert keys(direct, "many/") == sorted(key for key, fault in results if not fault)


def test_faults_are_checked():
    with pytest.raises(ValueError, match="no such fault: typo"):
        FaultyProxy("127.0.0.1", 1, {"typo": 0.1})
    with pytest.raises(ValueError, match="at most 1"):
        FaultyProxy("127.0.0.1", 1, dict.fromkeys(FAULTS, 0.5))
