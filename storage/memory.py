"""Keeps blobs in this process's memory: for tests, the simulator, and as the simplest store."""

import threading

from storage.blob import validate_key, validate_prefix, validate_range
from storage.digest import Buffer
from storage.errors import BlobExistsError, BlobNotFoundError


class MemoryStore:
    """A `BlobStore` that lasts as long as the object."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        validate_key(key)
        # Copy outside the lock: the caller may change its buffer as soon as this returns.
        blob = bytes(data)
        with self._lock:
            if key in self._blobs:
                raise BlobExistsError(f"key is taken: {key}")
            self._blobs[key] = blob

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        validate_range(start, length)
        blob = self._blob(key)
        return blob[start:] if length is None else blob[start : start + length]

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        return len(self._blob(key))

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        validate_prefix(prefix)
        with self._lock:
            return sorted(key for key in self._blobs if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        validate_key(key)
        with self._lock:
            self._blobs.pop(key, None)

    def _blob(self, key: str) -> bytes:
        validate_key(key)
        with self._lock:
            blob = self._blobs.get(key)
        if blob is None:
            raise BlobNotFoundError(f"no blob: {key}")
        return blob
