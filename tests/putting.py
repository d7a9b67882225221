"""Puts to a folder and to a bucket, which are several operations each, killed after every one."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fsspec.asyn import sync

from storage.errors import (
    StorageUnavailableError,
)
from storage.local import LocalStore
from storage.manifest import body_key
from storage.remote import S3Store
from tests.crashes import Killed, table


def local_table(root: Path) -> str:
    """Return the table of a put to a folder, killed after each operation of the file system."""
    cells = []
    for number in itertools.count():
        folder = root / str(number)
        steps: list[str] = []

        def kill(name: str, number: int = number, steps: list[str] = steps) -> None:
            if len(steps) == number:
                raise Killed
            steps.append(name)

        over = True
        try:
            LocalStore(folder / "run", before=kill).put("a/k", b"whole")
        except Killed:
            over = False
        store = LocalStore(folder / "run")
        there = store.keys()
        assert there in ([], ["a/k"])
        if there:
            assert store.get("a/k") == b"whole"
        left = [path for path in folder.rglob(".tmp-*") if path.is_file()]
        removed = "`sweep_old`, after an hour" if left else "-"
        if left:
            swept = [store.root / found.name for found in store.sweep_old(-60.0)]
            assert swept == left
        if not there:
            store.put("a/k", b"again")
        if steps:
            names = (steps[-1], "the blob" if there else "-", "`.tmp-...`" if left else "-")
            cells.append((*names, removed))
        if over:
            return table(("after", "readers see", "left behind", "removed by"), cells)
    raise AssertionError


class Connection:
    """Counts the requests of a store's client, and sends none after so many."""

    def __init__(self, store: S3Store, requests_max: int) -> None:
        self.sent: list[str] = []
        self._max = requests_max
        client = self._client = store._filesystem
        self._call, self._call_soon = client._call_s3, client.call_s3
        client._call_s3 = self.call
        client.call_s3 = partial(sync, client.loop, self.call)

    def restore(self) -> None:
        """Send everything again."""
        self._client._call_s3, self._client.call_s3 = self._call, self._call_soon

    async def call(self, method: str, *arguments: object, **more: object) -> object:
        if len(self.sent) >= self._max:
            raise ConnectionError("killed: nothing is sent any more")
        self.sent.append(method)
        return await self._call(method, *arguments, **more)


def bucket_table(opened: Callable[[], S3Store], size: int) -> str:
    """Return the table of a put to a bucket, killed after each request.

    Args:
        opened: opens a new, empty store with a client of its own.
        size: bytes of the blob.
    """
    cells, data, key = [], bytes(size), body_key(10, 1, 0)
    for number in itertools.count():
        store = opened()
        connection = Connection(store, number)
        over = True
        try:
            store.put(key, data)
        except StorageUnavailableError:
            over = False
        connection.restore()
        there = store.keys()
        assert there in ([], [key])
        if there:
            assert store.size(key) == size
        left = store.sweep_old(3600.0)
        if not there:
            store.put(key, b"the key is free")
        if connection.sent:
            parts = connection.sent.count("upload_part")
            after = connection.sent[-1] + (f" ({parts} of them)" if parts and not there else "")
            left_words = "parts that no listing shows" if left else "-"
            removed = "`sweep_old`, after an hour" if left else "-"
            cells.append((f"`{after}`", "the blob" if there else "-", left_words, removed))
        if over:
            return table(("after", "readers see", "left behind", "removed by"), cells)
    raise AssertionError
