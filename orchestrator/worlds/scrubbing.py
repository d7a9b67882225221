"""Reads checkpoints of the durable tier back, slowly and in the background, newest first.

What turns out whole becomes an anchor that may be kept for long; what is damaged is barred before
anybody needs it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from storage.blob import BlobStore
from storage.catalog import Catalog
from storage.errors import StorageError
from storage.scrub import Examined, due, scrub
from storage.verdicts import Where
from storage.wrappers import ThrottledStore

log = logging.getLogger(__name__)


class Scrubber:
    """Scrubs one store in a thread of its own, which nobody waits for.

    Args:
        store: of the run.
        bytes_per_s: read at most so much.
    """

    def __init__(self, store: BlobStore, bytes_per_s: float) -> None:
        self._catalog = Catalog(ThrottledStore(store, bytes_per_s))
        self._tell: Callable[[Examined], None] = lambda _: None
        self._reading: Where | None = None
        self._lock = threading.Lock()
        self._woken = threading.Event()
        self._thread: threading.Thread | None = None

    def wake(self, tell: Callable[[Examined], None] = lambda _: None) -> None:
        """Look for what is not verified yet; returns at once.

        Args:
            tell: takes what came of each, from the thread that reads, until it is woken again.
        """
        self._tell = tell
        self._woken.set()
        with self._lock:
            if self._thread is None:
                # Not before there is something to read: many a store is only looked at.
                self._thread = threading.Thread(target=self._work, name="scrub", daemon=True)
                self._thread.start()

    def reads(self, step: int, epoch: int) -> bool:
        """Return whether it reads this checkpoint just now, which must stay until it is done.

        Reading one may take longer than it would be kept; no anchor would ever come of it.
        """
        return self._reading == (step, epoch)

    def _work(self) -> None:
        while self._woken.wait():
            self._woken.clear()
            try:
                self._scrub_all()
            except StorageError as error:
                log.warning("the durable tier is not scrubbed for now: %s", error)
            except Exception:
                log.exception("the durable tier is not scrubbed")

    def _scrub_all(self) -> None:
        """Scrub one after the other; what is newer by then comes first."""
        while records := [record for record in due(self._catalog) if record.manifest]:
            record = records[0]
            self._reading = (record.step, record.epoch)
            try:
                examined = scrub(self._catalog, record)
            finally:
                self._reading = None
            if examined is not None:
                self._tell(examined)
            if examined is not None and examined.damages:
                told = "; ".join(map(str, examined.damages[:3]))
                log.error("checkpoint of step %d is damaged: %s", record.step, told)
