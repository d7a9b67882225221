"""Does the same to many things in several processes, and leaves none behind, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from orchestrator.agent import linux
from orchestrator.cli.errors import CliError

T = TypeVar("T")
R = TypeVar("R")
REAP_S = 5.0
"""A worker that was killed is gone long before."""


def each(
    work: Callable[[T], R],
    items: Sequence[T],
    *,
    jobs: int,
    begin: Callable[[], object] | None = None,
) -> Generator[R, None, None]:
    """Yield what comes of each item, as it comes; whatever interrupts it ends all processes.

    Args:
        work: a function of a module, since it is called in other processes.
        items: what it is called with.
        jobs: processes at a time.
        begin: called once in each process before anything else. It may hold shared memory, which
            can be handed to a process at its start only.

    Raises:
        CliError: if a process was ended from outside.
    """
    if not items:
        return
    # Not forked: what a parent's threads hold at that moment, a child would hold for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        min(jobs, len(items)),
        mp_context=context,
        initializer=_begin,
        initargs=(os.getpid(), begin),
    )
    try:
        tasks: list[Future[R]] = [pool.submit(work, item) for item in items]
        # The executor looks at its processes anew whenever it is given something, which is before
        # it has begun another one: the end of the last one would be noticed with the next result.
        pool.submit(_nothing)
        for task in as_completed(tasks):
            yield task.result()
    except BrokenProcessPool as error:
        raise CliError(
            "a process that worked on it was ended from outside, perhaps for want of memory",
            "give it fewer --jobs, or more memory",
        ) from error
    except BaseException:
        workers = multiprocessing.active_children()
        for process in workers:
            process.kill()
        for process in workers:
            process.join(REAP_S)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _nothing() -> None:
    pass


def _begin(parent: int, begin: Callable[[], object] | None) -> None:
    """Have the kernel end this process with the one that it works for, however that ends."""
    if sys.platform == "linux":
        linux.die_with(parent)
    if begin is not None:
        begin()
