"""A store of which only what is read back is in this process's memory, as of one that is elsewhere.

Of a shard there is a bit for its body and one for its index: so what a process keeps by committing
checkpoints can be told from what a store keeps of them.
"""

import threading
from collections import defaultdict

from storage.digest import Buffer
from storage.errors import BlobExistsError, BlobNotFoundError
from storage.manifest import GENERATIONS, body_key, generation_prefix, index_key
from storage.memory import MemoryStore

_Where = tuple[int, int]
"""Step and epoch."""


class Elsewhere:
    """A `BlobStore` whose bodies and indices are empty.

    Args:
        shards: of a checkpoint, at most.
    """

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._there: dict[_Where, bytearray] = defaultdict(lambda: bytearray(2 * shards))
        self._rest = MemoryStore()
        self._lock = threading.Lock()

    def put(self, key: str, data: Buffer) -> None:
        """See `BlobStore.put`."""
        if not _is_of_a_shard(key):
            self._rest.put(key, data)
            return
        where, place = _placed(key)
        with self._lock:
            there = self._there[where]
            if there[place]:
                raise BlobExistsError(f"key is taken: {key}")
            there[place] = 1

    def get(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """See `BlobStore.get`."""
        if not _is_of_a_shard(key):
            return self._rest.get(key, start, length)
        self.size(key)
        return b""

    def size(self, key: str) -> int:
        """See `BlobStore.size`."""
        if not _is_of_a_shard(key):
            return self._rest.size(key)
        where, place = _placed(key)
        with self._lock:
            if where not in self._there or not self._there[where][place]:
                raise BlobNotFoundError(f"no blob: {key}")
        return 0

    def keys(self, prefix: str = "") -> list[str]:
        """See `BlobStore.keys`."""
        with self._lock:
            wanted = [
                (where, bytes(there))
                for where, there in self._there.items()
                if generation_prefix(*where).startswith(prefix)
                or prefix.startswith(generation_prefix(*where))
            ]
        found = [
            key
            for (step, epoch), there in wanted
            for place, is_there in enumerate(there)
            if is_there
            for key in [(body_key, index_key)[place % 2](step, epoch, place // 2)]
            if key.startswith(prefix)
        ]
        return sorted([*self._rest.keys(prefix), *found])

    def delete(self, key: str) -> None:
        """See `BlobStore.delete`."""
        if not _is_of_a_shard(key):
            self._rest.delete(key)
            return
        where, place = _placed(key)
        with self._lock:
            there = self._there.get(where)
            if there is not None:
                there[place] = 0
                if not any(there):
                    del self._there[where]


def _is_of_a_shard(key: str) -> bool:
    return key.startswith(GENERATIONS) and not key.endswith("/digests")


def _placed(key: str) -> tuple[_Where, int]:
    """Return the checkpoint that a shard's key is of, and where its bit is."""
    _, _, generation, name = key.split("/")
    step, _, epoch = generation.partition("-")
    shard, _, kind = name.removeprefix("s").partition(".")
    return (int(step), int(epoch)), 2 * int(shard) + (kind == "idx")
