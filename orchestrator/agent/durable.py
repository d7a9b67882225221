"""A node's way to the durable tier, and the faults that a plan may let loose on it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from orchestrator.agent.shards import Shard
from orchestrator.agent.transfer import create, write_all
from orchestrator.protocol.ids import Rank, Step
from storage.address import open_store
from storage.blob import BlobStore
from storage.commit import fetch_index, group_of, pour_body
from storage.errors import BlobNotFoundError, ForeignCheckpointError
from storage.faulty import FaultyStore
from storage.local import LocalStore
from storage.manifest import (
    COMMITS,
    Manifest,
    body_key,
    describe,
    parse_commit_key,
    read_manifest,
)
from storage.shard import encode_index
from storage.wrappers import CountingStore, RetryingStore

ATTEMPTS_MAX = 5
CHANGED_BYTES = 8
T = TypeVar("T")


class DurableCheckpoint:
    """The checkpoint at key `commit` of a store, whose record is read once for all of its shards.

    Thousands of nodes with eight ranks each need not read a record of 0.1 MB for every rank, nor
    what else is of several shards.

    Whoever asks meanwhile waits for the same read, and keeps no thread with that: a store that
    never answers would have all of a node's before long. What failed is read again. Methods belong
    on the event loop; one of some threads reads.
    """

    def __init__(self, store: BlobStore, commit: str) -> None:
        self.store, self.commit = store, commit
        self._reading: Future[Manifest] | None = None
        self._groups: dict[int, Future[bytes]] = {}

    def manifest(self, threads: Executor) -> Future[Manifest]:
        """Return its commit record."""
        if (last := _good(self._reading)) is None:
            self._reading = last = threads.submit(_read_record, self.store, self.commit)
        return last

    def group(self, manifest: Manifest, shard: int, threads: Executor) -> Future[bytes]:
        """Return the digests of a shard's group, of a manifest that has groups.

        Of an encrypted store the least that can be read has the digests of all groups.

        Raises:
            ValueError: if the manifest has no such shard.
        """
        start, _, _ = manifest.group(shard)
        if (last := _good(self._groups.get(start))) is None:
            last = threads.submit(group_of, self.store, manifest, shard)
            self._groups[start] = last
        return last


@dataclass(frozen=True, slots=True)
class DurableShard:
    """Where a shard lies on the durable tier."""

    checkpoint: DurableCheckpoint
    shard: int
    """Its number there."""


def _good(reading: Future[T] | None) -> Future[T] | None:
    """Return a read that is under way or came to something; None if it has to be begun."""
    if reading is None or reading.cancelled():
        return None
    return None if reading.done() and reading.exception() is not None else reading


def _read_record(store: BlobStore, commit: str) -> Manifest:
    named = parse_commit_key(commit)
    if named is None:
        raise ForeignCheckpointError(f"no key of a commit: {commit!r}")
    manifest = read_manifest(store, commit)
    if (manifest.step, manifest.epoch) != named:
        raise ForeignCheckpointError(f"record is of another {describe(manifest)}: {commit}")
    return manifest


def require_step(manifest: Manifest, step: Step) -> None:
    """Raise ForeignCheckpointError if a checkpoint is of another step."""
    if manifest.step != step:
        raise ForeignCheckpointError(f"{describe(manifest)}, expected step {step}")


def read_shard(
    durable: DurableShard,
    manifest: Manifest,
    group: bytes | None,
    wanted: tuple[Rank, Step],
    path: Path,
) -> Shard:
    """Read a committed shard into a new file of shared memory, verified. Blocks.

    Args:
        durable: where it lies.
        manifest: of its checkpoint.
        group: the digests of its group, if there are groups.
        wanted: who is to have it, and of which step.
        path: of the file.

    Raises:
        StorageError: if it can not be read, or is not of the step wanted.
        NoRoomError: if there is too little shared memory. There is no file then, either.
    """
    require_step(manifest, wanted[1])
    store = durable.checkpoint.store
    index = fetch_index(store, manifest, durable.shard, group)
    descriptor = create(path, index.size)
    try:
        pour_body(store, index, partial(write_all, descriptor))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return Shard.of(wanted[0], encode_index(index).decode(), path)


class DurableTier:
    """One node's connection to the store of its run.

    Attributes:
        uri: of the store.
        store: what everybody uses; repeats what may succeed later.
        counts: the same, with what was asked of it so far.
    """

    def __init__(self, uri: str) -> None:
        """Connect to the store at `uri`; nothing is read or written yet.

        Raises:
            UnsupportedUriError: if no store can be opened for it.
        """
        self.uri = uri
        self._root = open_store(uri)
        self._faulty = FaultyStore(self._root)
        self.counts = CountingStore(RetryingStore(self._faulty, attempts_max=ATTEMPTS_MAX))
        self.store: BlobStore = self.counts
        self._ends: dict[str, asyncio.TimerHandle] = {}

    @property
    def reads(self) -> int:
        """How often the store was asked for something so far; 0 if no recovery needed it."""
        return self.counts.reads

    def fill(self, lasts_s: float | None) -> None:
        """Have every put find the disk full from now on, for that many seconds (None: for good).

        To be called on the event loop; so are `forbid` and `slow_down`. A second fault of a kind
        replaces the first.
        """
        self._faulty.full = True
        self._end_after("full", lasts_s, lambda: setattr(self._faulty, "full", False))

    def forbid(self, lasts_s: float | None) -> None:
        """Have every put find a file system that is mounted to be read alone; see `fill`."""
        self._faulty.read_only = True
        self._end_after("read-only", lasts_s, lambda: setattr(self._faulty, "read_only", False))

    def slow_down(self, delay_s: float, lasts_s: float | None) -> None:
        """Have every operation take `delay_s` more from now on, for `lasts_s` seconds."""
        self._faulty.slow_s = delay_s
        self._end_after("slow", lasts_s, lambda: setattr(self._faulty, "slow_s", 0.0))

    def corrupt_newest(self) -> str:
        """Change a few bytes in the middle of a shard of the newest checkpoint, in the store.

        Blocks for as long as the store takes.

        Returns:
            Which bytes of which file, for people.

        Raises:
            BlobNotFoundError: if there is no checkpoint, or its shard is not there.
        """
        found = [parse_commit_key(key) for key in self._root.keys(COMMITS)]
        newest = max((where for where in found if where), default=None)
        if newest is None:
            raise BlobNotFoundError("there is no checkpoint that could be corrupted")
        key = body_key(*newest, 0)
        size = self._root.size(key)
        at = max(size - CHANGED_BYTES, 0) // 2
        # Counted up, not inverted: doing it twice must not heal it.
        changed = bytes((byte + 1) & 0xFF for byte in self._root.get(key, at, CHANGED_BYTES))
        if isinstance(self._root, LocalStore):
            _write_over(self._root.root / key, at, changed)
            where = str(self._root.root / key)
        else:
            body = bytearray(self._root.get(key))
            body[at : at + len(changed)] = changed
            self._root.delete(key)
            self._root.put(key, body)
            where = key
        return f"changed bytes {at} to {at + len(changed) - 1} of {where}"

    def close(self) -> None:
        """End every fault that is let loose."""
        for handle in self._ends.values():
            handle.cancel()
        self._ends.clear()
        self._faulty.full = self._faulty.read_only = False
        self._faulty.slow_s = 0.0

    def _end_after(self, kind: str, lasts_s: float | None, end: Callable[[], None]) -> None:
        earlier = self._ends.pop(kind, None)
        if earlier is not None:
            earlier.cancel()
        if lasts_s is not None:
            self._ends[kind] = asyncio.get_running_loop().call_later(lasts_s, end)


def _write_over(path: Path, at: int, changed: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.pwrite(descriptor, changed, at)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
