"""Says what every store must do: five operations on immutable blobs.

There is no overwrite and no rename, because object stores have no rename and because a blob that
never changes can be copied, cached and checked without asking anyone. Every store passes
tests/contract/test_stores.py.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from storage.digest import Buffer
from storage.errors import BlobTooLargeError

KEY_LENGTH_MAX = 512

# A segment never starts with a dot: that rules out "." and "..", and leaves names that start with
# a dot to the stores themselves for their temporary files.
_KEY = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*(/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)*")
_PREFIX = re.compile(r"([A-Za-z0-9_=-][A-Za-z0-9._=-]*/?)*")


class BlobStore(Protocol):
    """Immutable blobs under keys such as "gen/3f/100-2/s0.st"; safe to use from several threads."""

    def put(self, key: str, data: Buffer) -> None:
        """Store a blob that was not there; when this returns, it survives a loss of power.

        Readers see the whole blob or none of it.

        Raises:
            BlobExistsError: if the key is taken, by whatever content; the content stays.
            StorageFullError: if there is no room; nothing of the blob stays.
            StorageUnavailableError: if it is not known whether the blob was stored.
            ValueError: if the key is malformed.
        """
        ...

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Return up to `length` bytes from `start`, like a slice: fewer or none past the end.

        Raises:
            BlobNotFoundError: if nothing is stored under the key.
            ValueError: if the key is malformed, or start or length is negative.
        """
        ...

    def size(self, key: str) -> int:
        """Return the blob's size in bytes.

        Raises:
            BlobNotFoundError: if nothing is stored under the key.
        """
        ...

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys that start with the prefix, in ascending order of their bytes."""
        ...

    def delete(self, key: str) -> None:
        """Remove the blob; a key with nothing under it is no error, so that it can be repeated."""
        ...


class LeftOver(NamedTuple):
    """What a writer that died has not finished.

    Attributes:
        name: of the file, as a path in the store; of an upload of parts, its key.
        size: bytes that it takes.
    """

    name: str
    size: int


@runtime_checkable
class Sweepable(Protocol):
    """A store in which writers that died leave things behind that no key leads to."""

    def left_over(self, idle_s: float) -> Sequence[LeftOver]:
        """Return what nobody has worked on for so long, by name.

        Args:
            idle_s: seconds, by the store's own clock: those of writers and readers may be wrong.

        Raises:
            StorageError: if the store does not answer or refuses.
        """
        ...

    def sweep_old(self, idle_s: float) -> Sequence[LeftOver]:
        """Remove what `left_over` returns; return what was removed.

        Raises:
            StorageError: if the store does not answer or refuses.
        """
        ...


@runtime_checkable
class ReadsInto(Protocol):
    """A store that can read into memory of the caller's: what is large is copied once less."""

    def get_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill a flat, writable buffer from byte `start` on; return the bytes read.

        Fewer than it holds past the end of the blob, like `BlobStore.get`, which says what is
        raised.
        """
        ...


def get_into(store: BlobStore, key: str, start: int, buffer: memoryview) -> int:
    """Read from any store into the caller's memory; see `ReadsInto.get_into`."""
    if isinstance(store, ReadsInto):
        return store.get_into(key, start, buffer)
    data = store.get(key, start, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def get_small(store: BlobStore, key: str, bytes_max: int) -> bytes:
    """Return a blob that is small by nature, without taking memory for one that is not.

    Raises:
        BlobTooLargeError: if it has more than `bytes_max` bytes.
        BlobNotFoundError: if nothing is stored under the key.
    """
    data = store.get(key, 0, bytes_max + 1)
    if len(data) > bytes_max:
        raise BlobTooLargeError(f"blob has more than {bytes_max} bytes: {key}")
    return data


def validate_key(key: str) -> str:
    """Return the key, if every store can hold it.

    Raises:
        ValueError: if it is absolute, climbs out, is too long, or has characters outside
            letters, digits and `. _ = - /`.
    """
    if len(key) > KEY_LENGTH_MAX or not _KEY.fullmatch(key):
        raise ValueError(f"key must be a relative path of letters, digits and ._=-: {key[:80]!r}")
    return key


def validate_prefix(prefix: str) -> str:
    """Return the prefix, if a key could start with it.

    Raises:
        ValueError: if no key can.
    """
    if len(prefix) > KEY_LENGTH_MAX or not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix must be the start of a key: {prefix[:80]!r}")
    return prefix


def validate_range(start: int, length: int | None) -> None:
    """Check a range to read.

    Raises:
        ValueError: if start or length is negative.
    """
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"start is {start} and length is {length}, must be 0 or more")
