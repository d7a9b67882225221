"""How a large blob goes up in parts: what the service is asked, and what if it refuses."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from storage.parts import Upload, crc32c_words

PART = 4
BLOB = memoryview(bytes(range(4 * PART + 1)))
WHERE = {"Bucket": "b", "Key": "run/k"}


class Service:
    """Answers requests, and refuses those that it is told to.

    Attributes:
        refuses: the request, and the number of the part, that is answered with an error.
        over: names of the requests that were answered, in this order.
    """

    def __init__(self, refuses: tuple[str, int | None] = ("", None)) -> None:
        self.refuses = refuses
        self.over: list[str] = []
        self.asked: dict[tuple[str, int | None], dict[str, Any]] = {}
        self._lock = threading.Lock()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        asked = (method, parameters.get("PartNumber"))
        with self._lock:
            self.over.append(method)
            self.asked[asked] = parameters
        if asked == self.refuses:
            raise ConnectionError(f"{method} is refused")
        return {"UploadId": "u1", "ETag": f"etag {asked[1]}"}


def upload(call: Callable[..., dict[str, Any]], *, checksum: bool = True) -> None:
    Upload(call=call, where=WHERE, part_bytes=PART, checksum=checksum).put(BLOB, {"mark": "m"})


def test_parts_cover_the_blob_and_are_named_with_their_checksums_when_it_is_completed() -> None:
    service = Service()

    upload(service.call)

    numbers = range(1, 6)
    bodies = [service.asked["upload_part", number]["Body"] for number in numbers]
    assert b"".join(bodies) == BLOB
    assert [len(body) for body in bodies] == [PART, PART, PART, PART, 1]
    completed = service.asked["complete_multipart_upload", None]
    assert completed["IfNoneMatch"] == "*"
    assert completed["MultipartUpload"]["Parts"] == [
        {"PartNumber": n, "ETag": f"etag {n}", "ChecksumCRC32C": crc32c_words(bodies[n - 1])}
        for n in numbers
    ]
    assert service.asked["create_multipart_upload", None]["Metadata"] == {"mark": "m"}


def test_a_service_that_takes_no_checksums_is_sent_none() -> None:
    service = Service()

    upload(service.call, checksum=False)

    assert "checksum" not in str(service.asked).lower()


@pytest.mark.parametrize(
    "refused", [*(("upload_part", n) for n in range(1, 6)), ("complete_multipart_upload", None)]
)
def test_an_upload_that_fails_is_given_up_after_the_last_part_is_over(
    refused: tuple[str, int | None],
) -> None:
    service = Service(refused)

    with pytest.raises(ConnectionError, match=f"{refused[0]} is refused"):
        upload(service.call)

    assert service.over[-1] == "abort_multipart_upload"
    assert service.over.count("abort_multipart_upload") == 1
    assert service.asked["abort_multipart_upload", None] == {**WHERE, "UploadId": "u1"}


def test_that_an_upload_could_not_be_given_up_does_not_hide_why_it_failed() -> None:
    first = Service(("upload_part", 2))

    def call(method: str, **parameters: Any) -> dict[str, Any]:
        if method == "abort_multipart_upload":
            raise ConnectionError("nor is that answered")
        return first.call(method, **parameters)

    with pytest.raises(ConnectionError, match="upload_part is refused"):
        upload(call)


def test_what_cannot_be_begun_leaves_nothing_to_give_up() -> None:
    service = Service(("create_multipart_upload", None))

    with pytest.raises(ConnectionError, match="create_multipart_upload"):
        upload(service.call)

    assert service.over == ["create_multipart_upload"]


def test_a_checksum_is_four_bytes_big_endian_in_base64() -> None:
    # What the polynomial of Castagnoli makes of these nine bytes is e3069283.
    assert crc32c_words(b"123456789") == "4waSgw=="
