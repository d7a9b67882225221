"""Adds one concern to a store each: counting, faults on demand, bounded repetition.

Every wrapper is itself a `BlobStore` and passes the same contract, so that they stack in any order.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from storage.blob import BlobStore
from storage.digest import Buffer, byte_view
from storage.errors import (
    BlobExistsError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)


@dataclass(slots=True)
class CountingStore:
    """Counts what was asked of a store, failed calls included; bytes of completed calls only."""

    inner: BlobStore
    puts: int = 0
    gets: int = 0
    sizes: int = 0
    lists: int = 0
    deletes: int = 0
    bytes_put: int = 0
    bytes_got: int = 0

    @property
    def reads(self) -> int:
        """How often it was asked for anything."""
        return self.gets + self.sizes + self.lists

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        self.puts += 1
        self.inner.put(key, data)
        self.bytes_put += memoryview(data).nbytes

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        self.gets += 1
        data = self.inner.get(key, start, length)
        self.bytes_got += len(data)
        return data

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        self.sizes += 1
        return self.inner.size(key)

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        self.lists += 1
        return self.inner.keys(prefix)

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self.deletes += 1
        self.inner.delete(key)


@dataclass(slots=True)
class FaultyStore:
    """Breaks a store in the ways that stores break; with no fault set it changes nothing.

    Every field may be set while the store is in use.

    Args:
        inner: the store that does the work.
        sleep: how to wait, in seconds; the simulator passes its own clock's.
        full: every put finds the disk full.
        slow_s: seconds that every operation takes on top.
        down: every operation goes unanswered.
        tear_at: the next put leaves only this many bytes under the key, and is not confirmed; then
            the fault is spent. This is a store that breaks its promise of whole blobs.
        lose_confirmation: the next put is carried out but not confirmed; then the fault is spent.
        flips: by key, the bit of the blob that reads return inverted (0 is the lowest bit of byte
            0). Stored bytes are not changed.
        before: called with (operation, key) before each operation; a test stops the caller there.
    """

    inner: BlobStore
    sleep: Callable[[float], None] = time.sleep
    full: bool = False
    slow_s: float = 0.0
    down: bool = False
    tear_at: int | None = None
    lose_confirmation: bool = False
    flips: dict[str, int] = field(default_factory=dict)
    before: Callable[[str, str], None] = lambda _operation, _key: None

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        self._enter("put", key)
        if self.full:
            raise StorageFullError(f"no space left on the device: {key}")
        if self.tear_at is not None:
            torn_bytes, self.tear_at = self.tear_at, None
            self.inner.put(key, byte_view(data)[:torn_bytes])
            raise StorageUnavailableError(f"connection lost after {torn_bytes} bytes: {key}")
        self.inner.put(key, data)
        if self.lose_confirmation:
            self.lose_confirmation = False
            raise StorageUnavailableError(f"connection lost before the confirmation: {key}")

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        self._enter("get", key)
        data = self.inner.get(key, start, length)
        byte, bit = divmod(self.flips.get(key, -1), 8)
        if not start <= byte < start + len(data):
            return data
        flipped = bytearray(data)
        flipped[byte - start] ^= 1 << bit
        return bytes(flipped)

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        self._enter("size", key)
        return self.inner.size(key)

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        self._enter("keys", prefix)
        return self.inner.keys(prefix)

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self._enter("delete", key)
        self.inner.delete(key)

    def _enter(self, operation: str, key: str) -> None:
        self.before(operation, key)
        if self.slow_s > 0:
            self.sleep(self.slow_s)
        if self.down:
            raise StorageUnavailableError(f"no answer to {operation}: {key}")


class RetryingStore:
    """Repeats what may succeed later, a bounded number of times, waiting twice as long each time.

    Args:
        inner: the store that does the work.
        attempts_max: calls in all, at least 1.
        wait_s: seconds before the second attempt.
        wait_s_max: seconds before any attempt, at most. The waits have no jitter: a node's agent
            is one client, and the writes of many nodes are spread by their own lengths.
        sleep: how to wait, in seconds.
    """

    def __init__(
        self,
        inner: BlobStore,
        *,
        attempts_max: int = 5,
        wait_s: float = 0.1,
        wait_s_max: float = 10.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.inner = inner
        self._retrying = Retrying(
            sleep=sleep,
            stop=stop_after_attempt(attempts_max),
            wait=wait_exponential(multiplier=wait_s, max=wait_s_max),
            retry=retry_if_exception(_is_retryable),
            reraise=True,
        )

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        unconfirmed = False

        def attempt() -> None:
            nonlocal unconfirmed
            try:
                self.inner.put(key, data)
            except BlobExistsError:
                # An earlier attempt may have been carried out and only its confirmation lost.
                if not (unconfirmed and self.inner.get(key) == byte_view(data)):
                    raise
            except StorageUnavailableError:
                unconfirmed = True
                raise

        self._retrying.copy()(attempt)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        return self._retrying.copy()(self.inner.get, key, start, length)

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        return self._retrying.copy()(self.inner.size, key)

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        return self._retrying.copy()(self.inner.keys, prefix)

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self._retrying.copy()(self.inner.delete, key)


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, StorageError) and error.retryable
