"""Reads micro-batches ahead in one thread, so that a step finds its own in memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from trainer.data import Batch, Batches

_LOOK_S = 0.1
"""A rank that waits shows a sign of life this often."""

Slice = tuple[int, range]
"""A step, and the indices of its global batch that make up a micro-batch."""


class DataStalledError(Exception):
    """The next micro-batch did not come."""

    hint = "is the disk with the token files slow or full of errors? data.waitMax is the limit"


class Prefetch:
    """Has the micro-batches of one rank at hand, in the order in which they are asked for.

    What it returns is what `samples` would; only who waits differs. The thread begins with the
    block and ends with it; what it raises is raised by the call that asks for that micro-batch.

    Args:
        samples: who has them.
        slices: all micro-batches that will be asked for, in order.
        depth: how many are read ahead at most; the thread holds one more.
        waiting: called every 0.1 s while there is none yet; may raise. It says that the rank
            waits for data, which is no hang.
        limit_s: how long to wait for one, seconds.
    """

    def __init__(
        self,
        samples: Batches,
        slices: Iterable[Slice],
        depth: int,
        waiting: Callable[[], None],
        limit_s: float,
    ) -> None:
        self._samples, self._slices, self._depth = samples, slices, depth
        self._waiting, self._limit_s = waiting, limit_s
        self._changed = threading.Condition()
        self._ahead: deque[tuple[Slice, Batch]] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self.waited_s = 0.0
        """For which steps had to wait, in all."""
        self._thread = threading.Thread(target=self._read, name="holdfast-data", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        # A read that hangs in the kernel is not waited out: the agent ends a rank that does not
        # leave its generation in time.
        self._thread.join()
        self._ahead.clear()

    @property
    def mark(self) -> float:
        """As of the samples."""
        return self._samples.mark

    def batch(self, step: int, indices: range) -> Batch:
        """Return these samples, as `Samples.batch` does.

        Raises:
            DataStalledError: if they do not come in time.
            Exception: whatever kept the thread from reading them.
        """
        with self._changed:
            begun = time.monotonic()
            while not self._ahead:
                if self._failure is not None:
                    raise self._failure
                if time.monotonic() - begun > self._limit_s:
                    raise DataStalledError(
                        f"no micro-batch in {self._limit_s:g} s, expected samples {indices.start} "
                        f"to {indices.stop - 1} of step {step}"
                    )
                if not self._changed.wait(_LOOK_S):
                    self._waiting()
            self.waited_s += time.monotonic() - begun
            slice_, batch = self._ahead.popleft()
            self._changed.notify_all()
        assert slice_ == (step, indices), f"read ahead is {slice_}, asked for is {(step, indices)}"
        return batch

    def _read(self) -> None:
        try:
            for slice_ in self._slices:
                batch = self._samples.batch(*slice_)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._ahead) < self._depth)
                    if self._closed:
                        return
                    self._ahead.append((slice_, batch))
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - the thread that asks raises it
            with self._changed:
                self._failure = error
                self._changed.notify_all()
