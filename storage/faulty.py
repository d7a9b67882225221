"""Breaks a store in the ways that stores break, on demand: for tests and for fault plans."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from storage.blob import BlobStore, get_into
from storage.digest import Buffer, byte_view
from storage.errors import (
    BlobExistsError,
    BlobNotFoundError,
    ClockSkewError,
    StorageFullError,
    StorageRefusedError,
    StorageUnavailableError,
)


@dataclass(slots=True)
class FaultyStore:
    """Breaks a store in the ways that stores break; with no fault set it changes nothing.

    Every field may be set while the store is in use.

    Args:
        inner: the store that does the work.
        sleep: how to wait, in seconds; the simulator passes its own clock's.
        full: every put finds the disk full.
        read_only: every put finds the file system mounted to be read alone.
        expired: every operation is refused, since credentials have expired.
        skewed: every operation is refused, since the clock here is not the service's.
        slow_s: seconds that every operation takes on top.
        down: every operation goes unanswered.
        busy: so many operations to come are answered with 503, too many requests; none is done.
        conflicts: so many puts to come are answered with 409, another request was at the same key
            at that moment; nothing is stored.
        taken: so many puts to come are answered with 412, the key is taken, although it is not.
        tear_at: the next put leaves only this many bytes under the key, and is not confirmed; then
            the fault is spent. This is a store that breaks its promise of whole blobs.
        lose_confirmation: the next put is carried out but not confirmed; then the fault is spent.
        late: whether a key that is put shows to readers and in listings only after `settle`. So
            writes become visible in another order than they were confirmed in.
        flips: by key, the bit of the blob that reads return inverted (0 is the lowest bit of byte
            0). Stored bytes are not changed.
        truncated: by key, how many bytes of the blob are left for readers.
        refused: keys of blobs that whoever asks may not read.
        before: called with (operation, key) before each operation; a test stops the caller there.
    """

    inner: BlobStore
    sleep: Callable[[float], None] = time.sleep
    full: bool = False
    read_only: bool = False
    expired: bool = False
    skewed: bool = False
    slow_s: float = 0.0
    down: bool = False
    busy: int = 0
    conflicts: int = 0
    taken: int = 0
    tear_at: int | None = None
    lose_confirmation: bool = False
    late: Callable[[str], bool] = lambda _key: False
    flips: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    before: Callable[[str, str], None] = lambda _operation, _key: None
    _hidden: set[str] = field(default_factory=set)

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        self._enter("put", key)
        self._refuse(key)
        if self.tear_at is not None:
            torn_bytes, self.tear_at = self.tear_at, None
            self.inner.put(key, byte_view(data)[:torn_bytes])
            raise StorageUnavailableError(f"connection lost after {torn_bytes} bytes: {key}")
        self.inner.put(key, data)
        if self.late(key):
            self._hidden.add(key)
        if self.lose_confirmation:
            self.lose_confirmation = False
            raise StorageUnavailableError(f"connection lost before the confirmation: {key}")

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        self._enter("get", key)
        self._look(key)
        data = self.inner.get(key, start, length)
        if key in self.truncated:
            data = data[: max(self.truncated[key] - start, 0)]
        byte, bit = divmod(self.flips.get(key, -1), 8)
        if not start <= byte < start + len(data):
            return data
        flipped = bytearray(data)
        flipped[byte - start] ^= 1 << bit
        return bytes(flipped)

    def get_into(self, key: str, start: int, buffer: memoryview) -> int:
        """See `ReadsInto.get_into`."""
        if key in self.truncated or key in self.flips:
            data = self.get(key, start, len(buffer))
            buffer[: len(data)] = data
            return len(data)
        self._enter("get", key)
        self._look(key)
        return get_into(self.inner, key, start, buffer)

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        self._enter("size", key)
        self._look(key)
        size = self.inner.size(key)
        return min(size, self.truncated.get(key, size))

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        self._enter("keys", prefix)
        return [key for key in self.inner.keys(prefix) if key not in self._hidden]

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self._enter("delete", key)
        self.inner.delete(key)
        self._hidden.discard(key)

    def settle(self) -> None:
        """Show everything that was put."""
        self._hidden.clear()

    def _enter(self, operation: str, key: str) -> None:
        self.before(operation, key)
        if self.slow_s > 0:
            self.sleep(self.slow_s)
        if self.expired:
            raise StorageRefusedError(f"credentials have expired, {operation} is refused: {key}")
        if self.skewed:
            raise ClockSkewError(f"clock differs, {operation} is refused: {key}")
        if self.down:
            raise StorageUnavailableError(f"no answer to {operation}: {key}")
        if self.busy > 0:
            self.busy -= 1
            raise StorageUnavailableError(f"too many requests, {operation} is answered 503: {key}")

    def _refuse(self, key: str) -> None:
        if self.full:
            raise StorageFullError(f"no space left on the device: {key}")
        if self.read_only:
            raise StorageRefusedError(f"Read-only file system: {key}")
        if self.conflicts > 0:
            self.conflicts -= 1
            raise StorageUnavailableError(f"another request is at the key, put is 409: {key}")
        if self.taken > 0:
            self.taken -= 1
            raise BlobExistsError(f"key is taken, put is answered 412: {key}")

    def _look(self, key: str) -> None:
        if key in self.refused:
            raise StorageRefusedError(f"Permission denied: {key}")
        if key in self._hidden:
            raise BlobNotFoundError(f"no blob yet: {key}")
