"""What the contract cannot see of object storage: how blobs go up, and what each refusal means."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from storage.address import open_store
from storage.digest import crc32c
from storage.errors import (
    BlobExistsError,
    ClockSkewError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)
from storage.manifest import body_key, commit_key, index_key
from storage.parts import crc32c_words
from storage.remote import S3Store
from tests.buckets import CREDENTIALS, Server

MIB = 1 << 20
BODY = body_key(10, 1, 0)


def test_a_large_blob_goes_up_in_parts_and_takes_its_key_once(s3: Server) -> None:
    store = s3.store(part_bytes=5 * MIB)
    data = bytearray(bytes(range(256)) * (11 * MIB // 256))

    store.put(BODY, memoryview(data))

    where = {"Bucket": store._bucket, "Key": store._root + BODY}
    found = s3.client.call_s3("head_object", **where, ChecksumMode="ENABLED")
    assert found["ETag"].strip('"').endswith("-3")
    sums = [crc32c(data[at : at + 5 * MIB]) for at in range(0, len(data), 5 * MIB)]
    assert found["ChecksumCRC32C"].startswith(crc32c_words(b"".join(s.to_bytes(4) for s in sums)))
    assert store.size(BODY) == len(data)
    assert store.get(BODY, 5 * MIB - 2, 4) == data[5 * MIB - 2 : 5 * MIB + 2]
    with pytest.raises(BlobExistsError, match=BODY):
        store.put(BODY, bytes(11 * MIB))
    assert store.get(BODY) == data
    # What was refused is not left behind for somebody to pay for.
    assert store.sweep_old(-1.0) == []


def begin_uploads(s3: Server, bucket: str, *keys: str, parts: tuple[bytes, ...] = ()) -> None:
    for key in keys:
        where = {"Bucket": bucket, "Key": key}
        upload = s3.client.call_s3("create_multipart_upload", **where)["UploadId"]
        for number, part in enumerate(parts, 1):
            more = {"UploadId": upload, "PartNumber": number, "Body": part}
            s3.client.call_s3("upload_part", **where, **more)


def test_parts_that_nobody_completed_are_aborted_once_they_are_old(s3: Server) -> None:
    store, ours = s3.store(), sorted([BODY, index_key(10, 1, 0), commit_key(10, 1)])
    begin_uploads(
        s3, store._bucket, *(f"{store._root}{key}" for key in ours), parts=(b"one", b"four")
    )

    century_s = 100 * 365.25 * 86400
    # This server says of every upload that it was begun in 2010.
    assert store.sweep_old(century_s) == []
    assert store.left_over(3600.0) == [(key, 7) for key in ours]
    assert store.sweep_old(3600.0) == [(key, 7) for key in ours]
    assert store.sweep_old(3600.0) == []


def test_uploads_of_other_programs_in_the_same_bucket_are_left_alone(s3: Server) -> None:
    bucket = s3.bucket()
    store = open_store(s3.uri(bucket, ""))
    assert isinstance(store, S3Store)
    others = ["backup.tar", "gen/notes.st", f"logs/{BODY}", f"{BODY}.gz", "commits/1.json"]
    begin_uploads(s3, bucket, BODY, *others)

    assert store.sweep_old(3600.0) == [(BODY, 0)]

    left = s3.client.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]
    assert sorted(upload["Key"] for upload in left) == sorted(others)


def test_a_bucket_that_is_gone_says_so_and_does_not_look_empty(s3: Server) -> None:
    bucket = s3.bucket()
    store = open_store(s3.uri(bucket))
    store.put("k", b"x")
    s3.drop(bucket)

    large = bytes(70 * MIB)
    for call in (
        *(lambda: store.put("k", b"x"), lambda: store.put("k", large)),
        *(lambda: store.get("k"), lambda: store.get("k", 0, 1), lambda: store.size("k")),
        *(store.keys, lambda: store.keys("a/"), lambda: store.delete("k")),
    ):
        with pytest.raises(StorageRefusedError, match=f"no bucket {bucket}"):
            call()


def test_a_whole_bucket_can_be_a_store_and_marks_of_folders_are_no_blobs(s3: Server) -> None:
    bucket = s3.bucket()
    store = open_store(s3.uri(bucket, ""))
    store.put("a/k", b"x")
    for mark in ("a/", "b/"):
        s3.client.call_s3("put_object", Bucket=bucket, Key=mark, Body=b"")

    assert store.keys() == ["a/k"]
    assert store.keys("a/") == ["a/k"]


def test_without_credentials_it_is_refused_for_good(
    s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    with pytest.raises(StorageRefusedError, match="credentials") as refused:
        open_store(s3.uri("some-bucket")).put("k", b"x")

    assert "environment" in refused.value.hint


def test_a_server_that_does_not_listen_may_do_so_later(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(StorageUnavailableError, match="k"):
        open_store("s3://bucket/run?endpoint=http://127.0.0.1:9").put("k", b"x")


ERROR = """<?xml version="1.0"?><Error><Code>{code}</Code><Message>no</Message>{more}</Error>"""


class Script(ThreadingHTTPServer):
    """A server that answers requests as it is told, and else as a bucket does.

    Attributes:
        answers: status and code of the answers to come, each for one request. With the code "lost"
            a request is carried out, and the connection ends without an answer.
        asked: the method of each request so far.
        stored: body and mark of each blob, by path.
        hashes: what each request says of its body, to be signed with the rest.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Scripted)
        self.answers: list[tuple[int, str]] = []
        self.asked: list[str] = []
        self.stored: dict[str, tuple[bytes, str]] = {}
        self.hashes: list[str] = []

    @property
    def uri(self) -> str:
        # Without checksums a body is sent as it is.
        return (
            f"s3://bucket/run?endpoint=http://127.0.0.1:{self.server_port}&checksum=when_required"
        )


class Scripted(BaseHTTPRequestHandler):
    server: Script
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.command)
        self.server.hashes.append(self.headers["x-amz-content-sha256"])
        status, code = self.server.answers.pop(0) if self.server.answers else (200, "")
        stored = self.server.stored
        if self.command == "PUT" and status == 200:
            if self.path in stored:
                status, code = 412, "PreconditionFailed"
            else:
                stored[self.path] = (body, self.headers["x-amz-meta-holdfast-put"])
        if code == "lost":
            self.close_connection = True
            return
        told, mark = b"", ""
        if self.command in {"GET", "HEAD"} and status == 200:
            told, mark = stored.get(self.path, (b"", "somebody else's"))
        elif code:
            more = "<Condition>If-None-Match</Condition>" if status == 412 else ""
            told = ERROR.format(code=code, more=more).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(told)))
        self.send_header("x-amz-meta-holdfast-put", mark)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)

    do_PUT = do_GET = do_HEAD = answer  # noqa: N815 - as the library calls them

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the same
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with Script() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (503, "SlowDown", StorageUnavailableError),
        (500, "InternalError", StorageUnavailableError),
        (409, "ConditionalRequestConflict", StorageUnavailableError),
        (400, "RequestTimeout", StorageUnavailableError),
        (400, "BadDigest", StorageUnavailableError),
        (412, "PreconditionFailed", BlobExistsError),
        (507, "XMinioStorageFull", StorageFullError),
        (403, "AccessDenied", StorageRefusedError),
        (400, "ExpiredToken", StorageRefusedError),
        (403, "InvalidAccessKeyId", StorageRefusedError),
        (403, "RequestTimeTooSkewed", ClockSkewError),
        (501, "NotImplemented", StorageRefusedError),
        (404, "NoSuchBucket", StorageRefusedError),
    ],
)
def test_each_refusal_of_a_put_says_what_can_be_done_and_is_not_asked_again(
    script: Script, status: int, code: str, kind: type[StorageError]
) -> None:
    script.answers = [(status, code)]

    with pytest.raises(kind, match="k"):
        open_store(script.uri).put("k", b"x")

    # Whoever has the key is asked for, lest it was ourselves.
    assert script.asked == (["PUT", "HEAD"] if status == 412 else ["PUT"])


@pytest.fixture
def ahead(s3: Server) -> Iterator[Server]:
    """The server, with a clock that is 20 min ahead of this machine's."""
    s3.be("ahead 1200")
    yield s3
    s3.be("well")


def test_a_clock_that_is_not_the_services_is_named_whatever_is_asked(ahead: Server) -> None:
    store = open_store(ahead.uri("some-bucket"))

    for ask in (
        lambda: store.put("k", b"x"),
        lambda: store.get("k"),
        lambda: store.size("k"),  # answered without words
        lambda: store.keys("commits/"),
        lambda: store.delete("k"),
    ):
        with pytest.raises(ClockSkewError, match=r"here is 1[12]\d\d s behind the") as refused:
            ask()

        assert not refused.value.retryable
        assert "NTP" in refused.value.hint


def test_a_refusal_by_a_service_of_the_same_time_is_none_of_its_clock(s3: Server) -> None:
    bucket = s3.bucket()
    store = open_store(s3.uri(bucket))
    s3.be("read-only")
    try:
        with pytest.raises(StorageRefusedError, match="AccessDenied") as refused:
            store.put("k", b"x")
        assert store.keys() == []
    finally:
        s3.be("well")

    assert not isinstance(refused.value, ClockSkewError)


def test_a_put_that_was_done_and_never_answered_is_recognised_as_our_own(script: Script) -> None:
    """The client repeats it by itself; that it finds the key taken must not be an answer."""
    script.answers = [(200, "lost")]
    store = open_store(script.uri)

    store.put("k", b"mine")
    with pytest.raises(BlobExistsError):
        store.put("k", b"mine")

    assert script.stored["/bucket/run/k"][0] == b"mine"
    assert script.asked == ["PUT", "PUT", "HEAD", "PUT", "HEAD"]


def test_a_body_is_hashed_to_be_signed_only_where_it_carries_no_checksum(script: Script) -> None:
    open_store(script.uri).put("k", b"x")
    open_store(script.uri.partition("&checksum")[0]).put("l", b"x")

    assert script.hashes == [hashlib.sha256(b"x").hexdigest(), "UNSIGNED-PAYLOAD"]
