"""Uploads a large blob to a bucket in parts, several at a time.

Each part is copied and its CRC-32C computed in a thread of its own, so that the one thread in which
the client talks to the service does nothing but send.
"""

import base64
import logging
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from storage import parallel
from storage.digest import crc32c

log = logging.getLogger(__name__)

PARTS_AT_ONCE = 8
PARTS_MAX = 10_000
"""S3's limit."""
CHECKSUM = "CRC32C"
"""Of those that S3 has had from the start, the one that processors compute: at many times the rate
of the CRC-32 that clients send unless told otherwise."""

Call = Callable[..., dict[str, Any]]
"""Makes a request, by S3's name for it and its parameters; returns the answer's fields."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Of one blob, under a key that nobody has yet.

    Attributes:
        call: makes requests; from several threads.
        where: bucket and key, as the service calls them.
        part_bytes: of each part; the last one may have fewer.
        checksum: whether parts carry one. What was damaged on the way is refused then.
    """

    call: Call
    where: Mapping[str, str]
    part_bytes: int
    checksum: bool

    def put(self, view: memoryview, metadata: Mapping[str, str]) -> None:
        """Upload all of it; it appears with the last request, if nobody took the key before.

        Raises:
            Exception: of the client's; the parts are given up then, and none is still being sent.
        """
        algorithm = {"ChecksumAlgorithm": CHECKSUM} if self.checksum else {}
        begun = self.call(
            "create_multipart_upload", **self.where, **algorithm, Metadata=dict(metadata)
        )
        upload = {**self.where, "UploadId": begun["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            return self._send(upload, view, number)

        try:
            numbers = range(1, 1 - (-len(view) // self.part_bytes))
            # Closed before anything else is done: a part that arrives after the upload was given up
            # would be paid for, and nobody would see it.
            with closing(
                parallel.ahead(send, numbers, min(PARTS_AT_ONCE, len(numbers)), joined=True)
            ) as sent:
                parts = list(sent)
            self.call(
                "complete_multipart_upload",
                **upload,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except BaseException:
            self._give_up(upload)
            raise

    def _send(self, upload: Mapping[str, str], view: memoryview, number: int) -> dict[str, Any]:
        start = (number - 1) * self.part_bytes
        # The client takes bytes and no views.
        body = bytes(view[start : start + self.part_bytes])
        checksum = {f"Checksum{CHECKSUM}": crc32c_words(body)} if self.checksum else {}
        answer = self.call("upload_part", **upload, PartNumber=number, Body=body, **checksum)
        return {"PartNumber": number, "ETag": answer["ETag"], **checksum}

    def _give_up(self, upload: Mapping[str, str]) -> None:
        try:
            self.call("abort_multipart_upload", **upload)
        except Exception as error:  # noqa: BLE001 - what went wrong before is what the caller hears
            # `S3Store.sweep_old` will.
            log.info("parts of %s are not given up yet: %s", upload["Key"], error)


def crc32c_words(body: bytes) -> str:
    """Return a body's CRC-32C as S3 writes it: four bytes, big-endian, in base64."""
    return base64.b64encode(crc32c(body).to_bytes(4, "big")).decode()
