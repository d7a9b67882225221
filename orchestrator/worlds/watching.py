"""Tells when processes of this machine end. One thread watches all of them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable


class Watch:
    """Watches processes; what it calls, it calls from its own thread."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ended: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        """Guards the start of the thread, and a descriptor until what it means is entered."""
        self._thread: threading.Thread | None = None

    def until_end(self, pid: int, ended: Callable[[], None]) -> None:
        """Have `ended` be called once, when a process has ended.

        Raises:
            ProcessLookupError: if there is no such process, or not any more.
            OSError: if this process has no descriptor left for that.
        """
        descriptor = os.pidfd_open(pid)
        with self._lock:
            self._ended[descriptor] = ended
            self._epoll.register(descriptor, select.EPOLLIN)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="watch-processes", daemon=True
                )
                self._thread.start()

    def _watch(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll():
                with self._lock:
                    ended = self._ended.pop(descriptor)
                    self._epoll.unregister(descriptor)
                    os.close(descriptor)
                ended()
