"""Keeps blobs in a bucket of object storage that speaks S3, through s3fs.

Large blobs go up as parts, several at a time, and appear when the last request is answered. Each
put, small or large, says If-None-Match: the key is taken by exactly one writer, without a rename.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import aiohttp
import s3fs
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
)

from storage.blob import LeftOver, validate_key, validate_prefix, validate_range
from storage.digest import Buffer, byte_view
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    ClockSkewError,
    StorageError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)
from storage.keys import is_ours
from storage.parts import PARTS_AT_ONCE, PARTS_MAX, Upload

CONNECT_S = 10.0
ANSWER_S = 60.0
FORBIDDEN = 403
_MARK = "holdfast-put"
_REASON_MAX = 300
_SKEW_S_MAX = 900.0
"""S3 believes nobody whose clock is further from its own."""
_SKEWED = "RequestTimeTooSkewed"

_FULL = {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "507"}
_REFUSED = {
    *("AccessDenied", "AccountProblem", "AllAccessDisabled", "InvalidAccessKeyId", "ExpiredToken"),
    *("InvalidToken", "TokenRefreshRequired", "SignatureDoesNotMatch", _SKEWED),
    *("AuthorizationHeaderMalformed", "InvalidBucketName", "NoSuchBucket", "NotImplemented"),
    *(
        "PermanentRedirect",
        "EntityTooLarge",
        "InvalidRequest",
        "InvalidArgument",
        "MethodNotAllowed",
    ),
    *("KeyTooLongError", "InvalidStorageClass", "301", "400", "401", "403", "405", "501"),
}
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to talk to a bucket.

    Attributes:
        endpoint: address of the service; None for what the environment says, else AWS.
        region: None for what the environment says.
        checksum: whether requests carry a checksum wherever they may, or only where they must. Some
            stores that speak S3 refuse what they do not know. With a checksum a body is not
            hashed once more to be signed, which over http it is otherwise.
        connections: at most so many at a time, for all threads together.
        part_bytes: size of the parts of large blobs; at least 5 MiB, S3's limit.
    """

    endpoint: str | None = None
    region: str | None = None
    checksum: Literal["when_supported", "when_required"] = "when_supported"
    connections: int = 64
    part_bytes: int = 32 * 1024 * 1024


def open_s3(bucket: str, root: str, connection: Connection) -> "S3Store":
    """Return the store of blobs under `root` in a bucket; nobody is connected to yet.

    Credentials come from where AWS's tools look for them: the environment, above all.
    """
    config = {
        "max_pool_connections": connection.connections,
        "connect_timeout": CONNECT_S,
        "read_timeout": ANSWER_S,
        "request_checksum_calculation": connection.checksum,
        "response_checksum_validation": connection.checksum,
        # Who repeats is `RetryingStore`, which waits longer each time and can be bounded.
        "retries": {"total_max_attempts": 1},
    }
    checked = connection.checksum == "when_supported"
    if checked:
        # SHA-256 in the thread that sends takes longer than all else that an upload does here.
        config["s3"] = {"payload_signing_enabled": False}
    region = {"region_name": connection.region} if connection.region else {}
    filesystem = s3fs.S3FileSystem(
        endpoint_url=connection.endpoint,
        client_kwargs=region,
        config_kwargs=config,
        # Listings must not be remembered: other processes write.
        use_listings_cache=False,
        skip_instance_cache=True,
        max_concurrency=PARTS_AT_ONCE,
    )
    filesystem.retries = 1
    return S3Store(filesystem, bucket, root, part_bytes=connection.part_bytes, checksum=checked)


class S3Store:
    """A `BlobStore` of objects under `root` in a bucket.

    Args:
        filesystem: an `s3fs.S3FileSystem` that repeats nothing and remembers no listings.
        bucket: which must exist.
        root: prefix of all keys, without a slash at its ends; empty for the whole bucket.
        part_bytes: size of the parts of large blobs. Blobs up to twice as large go up in one
            request. Up to `PARTS_AT_ONCE` parts are copied at a time.
        checksum: whether parts carry one.
    """

    def __init__(
        self,
        filesystem: Any,  # noqa: ANN401 - s3fs has no types
        bucket: str,
        root: str,
        *,
        part_bytes: int,
        checksum: bool = True,
    ) -> None:
        self._filesystem, self._checksum = filesystem, checksum
        self._bucket, self._root = bucket, f"{root}/" if root else ""
        self._part_bytes = part_bytes

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        path, view = self._path(key), byte_view(data)
        part_bytes = max(self._part_bytes, -(-len(view) // PARTS_MAX))
        # aiohttp repeats a put by itself when a connection breaks, and knows no way to be told not
        # to. The second one finds the key taken by the first: this is how to recognise our own.
        mark = {_MARK: secrets.token_hex(16)}
        with self._translated(key):
            try:
                if len(view) < 2 * part_bytes:
                    # The client sends bytes and no views.
                    self._filesystem.pipe_file(
                        path, bytes(view), chunksize=part_bytes, mode="create", Metadata=mark
                    )
                else:
                    Upload(
                        call=self._filesystem.call_s3,
                        where={"Bucket": self._bucket, "Key": self._root + key},
                        part_bytes=part_bytes,
                        checksum=self._checksum,
                    ).put(view, mark)
            except FileExistsError:
                if not self._has(key, mark):
                    raise
            except FileNotFoundError as error:
                self._require_bucket(error)
                # The upload is gone: aborted as left over, or completed and its answer was lost.
                raise StorageUnavailableError(f"{_reason(error)}: {key}") from error

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        path = self._path(key)
        validate_range(start, length)
        if length == 0:
            self.size(key)
            return b""
        span = {} if start == 0 and length is None else {"start": start}
        if length is not None:
            span["end"] = start + length
        with self._translated(key):
            try:
                data: bytes = self._filesystem.cat_file(path, **span)
            except OSError as error:
                if _code(error) in {"InvalidRange", "416"}:
                    return b""  # past the end
                raise
        return data

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        self._path(key)
        with self._translated(key):
            return int(self._head(key)["ContentLength"])

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        validate_prefix(prefix)
        folder = f"{self._bucket}/{self._root}"
        with self._translated(prefix):
            paths: list[str] = self._filesystem.find(folder.rstrip("/"), prefix=prefix)
        keys = [path[len(folder) :] for path in paths if path.startswith(folder)]
        # Consoles make empty objects that end with a slash, to show a folder.
        return sorted(key for key in keys if key.startswith(prefix) and key[-1:] not in {"", "/"})

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        path = self._path(key)
        with self._translated(key):
            self._filesystem.rm_file(path)

    def left_over(self, idle_s: float) -> list[LeftOver]:
        """Return the uploads of parts that were begun so long ago and never completed.

        Their parts cost money and no listing shows them. Only those count whose keys are of our own
        shapes: other programs may use the same bucket, and upload for days. See
        `Sweepable.left_over`.
        """
        with self._translated(self._root):
            return sorted(left for _, left in self._left_over(idle_s))

    def sweep_old(self, idle_s: float) -> list[LeftOver]:
        """Abort them; see `left_over`."""
        aborted = []
        with self._translated(self._root):
            for upload, left in self._left_over(idle_s):
                self._filesystem.call_s3("abort_multipart_upload", **upload)
                aborted.append(left)
        return sorted(aborted)

    def _left_over(self, idle_s: float) -> Iterator[tuple[dict[str, str], LeftOver]]:
        """Yield what names each such upload to the service, and to people."""
        for upload, now in self._uploads():
            key = upload["Key"][len(self._root) :]
            if not is_ours(key) or (now - upload["Initiated"]).total_seconds() <= idle_s:
                continue
            which = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            try:
                size = self._size_of_parts(which)
            except FileNotFoundError:
                continue  # completed or aborted meanwhile
            yield which, LeftOver(key, size)

    def _size_of_parts(self, which: dict[str, str]) -> int:
        size, more = 0, dict[str, int]()
        while True:
            page = self._filesystem.call_s3("list_parts", **which, **more)
            size += sum(int(part["Size"]) for part in page.get("Parts", []))
            if not page.get("IsTruncated"):
                return size
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def _head(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = self._filesystem.call_s3(
            "head_object", Bucket=self._bucket, Key=self._root + key
        )
        return found

    def _has(self, key: str, mark: dict[str, str]) -> bool:
        try:
            found = self._head(key).get("Metadata", {})
        except FileNotFoundError:
            return False  # deleted meanwhile, or it was an answer without a reason
        return bool(mark.items() <= found.items())

    def _uploads(self) -> Iterator[tuple[dict[str, Any], datetime]]:
        """Yield each upload that is not complete, and what time it is for the service."""
        more: dict[str, str] = {}
        while True:
            page = self._filesystem.call_s3(
                "list_multipart_uploads", Bucket=self._bucket, Prefix=self._root, **more
            )
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            yield from ((upload, now) for upload in page.get("Uploads", []))
            if not page.get("IsTruncated"):
                return
            more = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    def _path(self, key: str) -> str:
        return f"{self._bucket}/{self._root}{validate_key(key)}"

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Turn the client's errors into ours, which say what the caller can do."""
        try:
            yield
        except FileExistsError:
            raise BlobExistsError(f"key is taken: {key}") from None
        except FileNotFoundError as error:
            self._require_bucket(error)
            raise BlobNotFoundError(f"no blob: {key}") from None
        except _NO_CREDENTIALS as error:
            raise StorageRefusedError(f"{_reason(error)}: {key}") from error
        except (OSError, ClientError, BotoCoreError, aiohttp.ClientError) as error:
            raise _kind(error)(f"{_reason(error)}: {key}") from error

    def _require_bucket(self, error: FileNotFoundError) -> None:
        """Tell a blob that is not there from a bucket that is not: that one says nothing of blobs.

        Raises:
            StorageError: if the bucket does not exist, or is not to be reached.
        """
        try:
            if _code(error) != "NoSuchBucket":
                self._filesystem.call_s3("head_bucket", Bucket=self._bucket)
                return
        except FileNotFoundError:
            pass
        except (OSError, ClientError, BotoCoreError, aiohttp.ClientError) as worse:
            raise _kind(worse)(f"{_reason(worse)}: bucket {self._bucket}") from worse
        raise StorageRefusedError(f"there is no bucket {self._bucket}") from error


def _answer(error: BaseException) -> dict[str, Any]:
    """Return what the service answered; nothing if it was never asked."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    return getattr(cause, "response", None) or {}


def _code(error: BaseException) -> str:
    """Return the service's word for what is wrong; empty if it was never asked."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _is_refusal(error: BaseException) -> bool:
    """Return whether the service did not believe who asks, or what he may; it need not say why."""
    return bool(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode") == FORBIDDEN)


def _ahead_s(error: BaseException) -> float:
    """Return by how much the clock here is ahead of the service's, in seconds, if it told its own.

    An answer to a question about a blob's size has no words, so that a clock that differs would
    look like missing permissions.
    """
    told = _answer(error).get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        there = parsedate_to_datetime(str(told)).timestamp()
    except ValueError:
        return 0.0
    # It is this very clock that is in question.
    return time.time() - there  # noqa: TID251


def _kind(error: Exception) -> type[StorageError]:
    code = _code(error)
    if code in _FULL:
        return StorageFullError
    if code == _SKEWED or (_is_refusal(error) and abs(_ahead_s(error)) > _SKEW_S_MAX):
        return ClockSkewError
    if code in _REFUSED or isinstance(error, PermissionError):
        return StorageRefusedError
    return StorageUnavailableError


def _reason(error: Exception) -> str:
    """Return what the service or the client said, on one line of bounded length."""
    words = " ".join(str(error).split()) or type(error).__name__
    if _kind(error) is ClockSkewError and (ahead_s := _ahead_s(error)):
        side = "ahead of" if ahead_s > 0 else "behind"
        words = f"the clock here is {abs(ahead_s):.0f} s {side} the service's ({words})"
    code = _code(error)
    return f"{code}: {words}"[:_REASON_MAX] if code else words[:_REASON_MAX]
