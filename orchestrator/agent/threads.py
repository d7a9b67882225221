"""Threads for what may hang: a call to a file system that does not answer can not be ended."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class DaemonThreads(Executor):
    """Makes calls in a few threads that nobody waits for when all is over.

    One that hangs holds its thread; calls that no thread is left for wait, and may be cancelled.

    Args:
        at_once: threads, at most; made when they are needed.
        name: of the threads.
    """

    def __init__(self, at_once: int, name: str) -> None:
        self._at_once, self._name = at_once, name
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = 0
        self._unfinished = 0
        self._closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `Executor.submit`. Raises RuntimeError after `shutdown`."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name} is shut down")
            self._unfinished += 1
            self._calls.put(partial(self._make, future, partial(fn, *args, **kwargs)))
            if self._threads < min(self._unfinished, self._at_once):
                self._threads += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = True) -> None:  # noqa: FBT001, FBT002 - the signature of Executor
        """Begin nothing any more, and let go of the threads, each as soon as its call is over."""
        del wait, cancel_futures  # there is one way only: what hangs is not waited for
        with self._lock:
            self._closed = True
            for _ in range(self._threads):
                self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def _make(self, future: Future[Any], call: Callable[[], Any]) -> None:
        try:
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - told to whoever waits for the call
                future.set_exception(error)
            else:
                future.set_result(result)
        finally:
            with self._lock:
                self._unfinished -= 1
