"""Copies a rank's state into a slot beside what the next step computes.

From the update of a step to the update of the next one nothing writes to the state: forward and
backward only read it. So a thread copies and digests it meanwhile, and whoever is about to write to
it waits for the copy first (`Copying.wait`), and for nothing else. While nobody waits, each piece
is digested as soon as it is copied, in a core's cache; once somebody does, all that is left is
copied before any more of it is digested. Nobody waits for ever: a copy that does not get on, or is
late, is given up, and what it still reads of the state goes nowhere.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from storage.shard import ShardPlan

Bytes = npt.NDArray[np.uint8]

STILL_S = 5.0
"""A copy of which nothing moves for so long is stuck. Half of the least for which a rank may stand
still while it saves (`FLOOR_S` of orchestrator/detect/announced.py): so the save is given up before
the rank is taken to hang."""
_POLL_S = 0.02


class GivenUpError(Exception):
    """Whoever waited for this copy has gone on without it, and the state may be another by now."""


class Copying:
    """A state on its way into the body of a shard.

    Args:
        plan: of the body.
        tensors: in the order of the plan's chunks; what they hold now is what is copied.
        buffer: the body.

    Attributes:
        waited_for: set once somebody waits for it.
    """

    def __init__(self, plan: ShardPlan, tensors: Sequence[Tensor], buffer: memoryview) -> None:
        self.waited_for = threading.Event()
        self._body: Bytes = np.frombuffer(buffer, np.uint8)
        parts = zip(plan.spans, tensors, strict=True)
        self._left = deque((*span, tensor) for span, tensor in parts if tensor.numel())
        self._at = len(plan.header)
        self._source: Bytes | None = None
        """The bytes of the tensor that is being copied."""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._given_up = False
        """Never once it is over, nor is it ever over after that."""
        self._moved = 0
        self._error: BaseException | None = None
        # A stream of its own: on the one that training is on, copies would come after all that is
        # in line there, forward and backward of the next step for one.
        device = tensors[0].device if tensors else torch.device("cpu")
        self._stream = torch.Stream(device) if device.type != "cpu" else None
        self._ready = (
            torch.accelerator.current_stream(device).record_event() if self._stream else None
        )
        self._note_over()

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """Copy within this block, in a thread; what it raises is raised by `wait` as well."""
        try:
            with self._own_stream():
                yield
        except GivenUpError:
            raise  # nobody waits for it any more
        except BaseException as error:
            self._error = error
            self._over.set()
            raise

    def fill(self, place: int, memory: memoryview) -> None:
        """Copy what belongs into a piece of the body; all that is left, if somebody waits.

        Raises:
            GivenUpError: if whoever waited for it has gone on.
        """
        self._moved += 1
        hurried = self.waited_for.is_set()
        self._through(len(self._body) if hurried else place + len(memory))

    def whole(self) -> None:
        """Copy all of it now."""
        self._through(len(self._body))

    @property
    def moved(self) -> int:
        """Grows with each piece that is copied or about to be digested."""
        return self._moved

    @property
    def place(self) -> int:
        """Up to which byte of the body it is copied, about."""
        return self._at

    def wait(self, deadline: float, alive: Callable[[int], object] = lambda _: None) -> bool:
        """Return once the state may be written to, and whether there is a copy of it as it was.

        There is none after `deadline`, by `time.monotonic`, nor if nothing moved for `STILL_S`: the
        copy is given up then. It is read on for a moment, and what is read goes nowhere.

        Args:
            deadline: until when it is waited for.
            alive: called now and then, with how many pieces have moved; what it raises, this
                raises.

        Raises:
            BaseException: what the copy raised, if it came to nothing.
        """
        self.waited_for.set()
        moved, since = self._moved, time.monotonic()
        while not self._over.wait(_POLL_S):
            now, pieces = time.monotonic(), self._moved - moved
            if pieces:
                moved, since = moved + pieces, now
            if now > min(deadline, since + STILL_S) and self._give_up():
                return False
            alive(pieces)
        if self._error is not None:
            raise self._error
        return True

    def _give_up(self) -> bool:
        """Have it be of no use from now on; False if it is over."""
        with self._lock:
            self._given_up = not self._over.is_set()
            return self._given_up

    def _through(self, end: int) -> None:
        """Copy what is not copied yet of the body's bytes before `end`."""
        while self._left and self._at < end:
            start, stop, tensor = self._left[0]
            if self._source is None:
                self._source = np.frombuffer(bytes_of(tensor), np.uint8)
                self._at = start
            until = min(stop, end)
            copy_piece(self._body[self._at : until], self._source[self._at - start : until - start])
            self._at = until
            self._moved += 1
            if self._given_up:
                raise GivenUpError
            if until == stop:
                self._source = None
                self._left.popleft()
        self._note_over()

    def _note_over(self) -> None:
        if self._left:
            return
        with self._lock:
            if self._given_up:
                raise GivenUpError
            self._over.set()

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        assert self._ready is not None
        with self._stream:
            self._stream.wait_event(self._ready)
            yield


def copy_piece(target: Bytes, source: Bytes) -> None:
    """Copy bytes; unlike a memoryview's, this copy lets go of the interpreter's lock."""
    np.copyto(target, source)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; of a contiguous one on the CPU, its own memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    words: Bytes = flat.view(torch.uint8).numpy()
    return words.data
