"""Does many things at once: asks a store, whose answers take a round trip; works on many bytes."""

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

AT_ONCE = 32
FEW = 8
CORES = min(len(os.sched_getaffinity(0)), 4)
"""Threads for what is bound by memory: a few have all of its rate, and a node has more ranks."""


def each(call: Callable[[A], B], items: Sequence[A], *, at_once: int = AT_ONCE) -> list[B]:
    """Return what the call makes of each item, in the order of the items.

    A few items are gone through one after the other. The threads are daemons: a store that hangs
    keeps no program from ending.

    Raises:
        BaseException: what the first of the calls raised that raised anything; all others are over
            by then, or were not begun.
    """
    if len(items) <= FEW:
        return [call(item) for item in items]
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(items)):
        todo.put(number)
    done: dict[int, B] = {}
    failed: dict[int, BaseException] = {}

    def work() -> None:
        while not failed:
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done[number] = call(items[number])
            except BaseException as error:  # noqa: BLE001 - raised where the call was asked for
                failed[number] = error

    name = f"{threading.current_thread().name}-each"
    threads = [
        threading.Thread(target=work, name=name, daemon=True)
        for _ in range(min(at_once, len(items)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[min(failed)]
    return [done[number] for number in range(len(items))]


def ahead(
    call: Callable[[A], B], items: Sequence[A], depth: int, *, joined: bool = False
) -> Generator[B, None, None]:
    """Yield what the call makes of each item, in order, with up to `depth` calls under way.

    For what is read in pieces that are large enough to be counted: no more than `depth` are held.
    The threads are daemons, one for each call. Whoever stops early leaves the calls that are under
    way to end by themselves, unless they are to be joined.

    Args:
        call: what is done for each item.
        items: in the order in which they are yielded.
        depth: how many calls are under way at most.
        joined: whether closing this waits for the calls under way, which write into memory of the
            caller's. Close it yourself then: an error keeps it alive with its traceback.

    Raises:
        BaseException: what a call raised, when its turn comes.
    """
    if len(items) == 1:
        yield call(items[0])
        return
    name = f"{threading.current_thread().name}-ahead"
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            if len(pending) == depth:
                yield _first(pending)
            future: Future[B] = Future()
            args = (future, call, item)
            threading.Thread(target=_fulfil, args=args, name=name, daemon=True).start()
            pending.append(future)
        while pending:
            yield _first(pending)
    finally:
        if joined:
            wait(pending)


def _first(pending: "deque[Future[B]]") -> B:
    """Return the result of the oldest call; it is pending until then, also if we are stopped."""
    result = pending[0].result()
    pending.popleft()
    return result


def begin(call: Callable[[], B]) -> "Future[B]":
    """Run a call in a thread of its own, a daemon, and return what will have its result."""
    future: Future[B] = Future()
    name = f"{threading.current_thread().name}-begun"
    threading.Thread(
        target=_fulfil, args=(future, lambda _: call(), None), name=name, daemon=True
    ).start()
    return future


def _fulfil(future: Future[B], call: Callable[[A], B], item: A) -> None:
    try:
        future.set_result(call(item))
    except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
        future.set_exception(error)
