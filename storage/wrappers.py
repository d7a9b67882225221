"""Adds one concern to a store each: counting, a bounded rate, bounded repetition.

Every wrapper is itself a `BlobStore` and passes the same contract, so that they stack in any order.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from storage.blob import BlobStore, get_into, validate_range
from storage.digest import BLOCK_BYTES, Buffer, blocks_of
from storage.errors import BlobExistsError, StorageError, StorageUnavailableError


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

    def get_into(self, key: str, start: int, buffer: memoryview) -> int:
        """See `ReadsInto.get_into`."""
        self.gets += 1
        moved = get_into(self.inner, key, start, buffer)
        self.bytes_got += moved
        return moved

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


class ThrottledStore:
    """Moves bytes at a bounded rate, so that work in the background leaves room for the rest.

    A blob goes through in one piece; whoever comes next waits for as long as it should have taken.
    Several threads share the rate: each books its bytes before it moves them, and so has a moment
    of its own at which it may begin. Listings, sizes and deletions wait like an empty blob. To book
    no more than there is, the size is asked for first where a read has no bound, or a wide one.

    Args:
        inner: the store that does the work.
        bytes_per_s: read and written together, above 0.
        clock: seconds, never going back.
        sleep: how to wait, in seconds.
    """

    def __init__(
        self,
        inner: BlobStore,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s is {bytes_per_s}, must be above 0")
        self.inner = inner
        self._bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = clock()

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        self._wait(memoryview(data).nbytes)
        self.inner.put(key, data)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        validate_range(start, length)
        booked = length
        if booked is None or booked > BLOCK_BYTES:
            there = max(self.inner.size(key) - start, 0)
            booked = there if booked is None else min(booked, there)
        self._wait(booked)
        moved = 0
        try:
            data = self.inner.get(key, start, length)
            moved = len(data)
        finally:
            self._return(booked - moved)
        return data

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        self._wait()
        return self.inner.size(key)

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        self._wait()
        return self.inner.keys(prefix)

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self._wait()
        self.inner.delete(key)

    def _wait(self, booked_bytes: int = 0) -> None:
        """Wait until so many bytes may go through, which nobody else can book any more."""
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now)
            self._free_at = begin + booked_bytes / self._bytes_per_s
        if begin > now:
            self._sleep(begin - now)

    def _return(self, unused_bytes: int) -> None:
        """Give back what was booked and not moved, for those who come later."""
        with self._lock:
            self._free_at -= unused_bytes / self._bytes_per_s


class RetryingStore:
    """Repeats what may succeed later, a bounded number of times, waiting twice as long each time.

    A key that is taken (412) is never tried again: it is an answer, not a failure.

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
                if not (unconfirmed and _holds(self.inner, key, data)):
                    raise
            except StorageUnavailableError:
                unconfirmed = True
                raise

        self._retrying.copy()(attempt)

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        return self._retrying.copy()(self.inner.get, key, start, length)

    def get_into(self, key: str, start: int, buffer: memoryview) -> int:
        """See `ReadsInto.get_into`."""
        return self._retrying.copy()(get_into, self.inner, key, start, buffer)

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        return self._retrying.copy()(self.inner.size, key)

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        return self._retrying.copy()(self.inner.keys, prefix)

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        self._retrying.copy()(self.inner.delete, key)


def _holds(store: BlobStore, key: str, data: Buffer) -> bool:
    """Return whether a blob has this content, reading a block at a time."""
    if store.size(key) != memoryview(data).nbytes:
        return False
    at = 0
    for block in blocks_of(data):
        if store.get(key, at, len(block)) != block:
            return False
        at += len(block)
    return True


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, StorageError) and error.retryable
