"""A thread that reads ahead changes nothing but who waits."""

import threading
import time
import traceback
from collections.abc import Iterator

import numpy as np
import pytest

from orchestrator.protocol import runfile
from trainer.data import Batch, Samples
from trainer.prefetch import DataStalledError, Prefetch
from trainer.tokens import Tokens

IDS = np.random.default_rng(1).integers(0, 1000, 1000).astype(np.uint32)
SAMPLES = Samples(Tokens(IDS, "d16e57000000", 1024), runfile.Trainer(seq_len=16, global_batch=8))
SLICES = [(step, range(at, at + 2)) for step in range(1, 6) for at in (0, 2)]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    # Servers of other tests in this process have threads that come and go.
    assert [thread for thread in threading.enumerate() if thread.name == "holdfast-data"] == []


class Slow:
    """Reads a micro-batch once it is allowed to, and counts."""

    mark = SAMPLES.mark

    def __init__(self, allowed: int) -> None:
        self.allowed = threading.Semaphore(allowed)
        self.read = 0
        self.fails_at = 0

    def batch(self, step: int, indices: range) -> Batch:
        assert self.allowed.acquire(timeout=10)
        self.read += 1
        if self.read == self.fails_at:
            raise OSError("the disk is gone")
        return SAMPLES.batch(step, indices)


def nothing() -> None:
    pass


def test_what_is_read_ahead_is_what_would_be_read_when_needed() -> None:
    with Prefetch(SAMPLES, SLICES, 3, nothing, 10.0) as ahead:
        for step, indices in SLICES:
            found, expected = ahead.batch(step, indices), SAMPLES.batch(step, indices)
            assert np.array_equal(found.inputs, expected.inputs)
            assert np.array_equal(found.targets, expected.targets)
            assert found.cuts == expected.cuts
        assert ahead.mark == SAMPLES.mark


def test_no_more_is_read_ahead_than_was_asked_for() -> None:
    slow = Slow(100)
    with Prefetch(slow, SLICES, 2, nothing, 10.0) as ahead:
        ahead.batch(*SLICES[0])
        deadline = time.monotonic() + 5
        while slow.read < 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.05)

        # One is in the step's hands, two are ahead, and one waits in the thread's for room.
        assert slow.read == 4


def test_the_thread_ends_with_a_block_that_has_not_asked_for_all() -> None:
    with Prefetch(SAMPLES, SLICES, 1, nothing, 10.0) as ahead:
        ahead.batch(*SLICES[0])
        assert any(thread.name == "holdfast-data" for thread in threading.enumerate())


def test_what_the_thread_raises_is_raised_where_the_micro_batch_is_asked_for() -> None:
    slow = Slow(100)
    slow.fails_at = 3
    with Prefetch(slow, SLICES, 4, nothing, 10.0) as ahead:
        ahead.batch(*SLICES[0])
        ahead.batch(*SLICES[1])
        with pytest.raises(OSError, match="the disk is gone") as caught:
            ahead.batch(*SLICES[2])

    frames = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert frames[-2:] == ["_read", "batch"]


def test_whoever_waits_for_data_shows_signs_of_life_and_can_be_told_to_leave() -> None:
    slow = Slow(0)
    signs = 0

    def waiting() -> None:
        nonlocal signs
        signs += 1
        if signs == 3:
            slow.allowed.release()
        if signs > 3 and slow.read == 1:
            slow.allowed.release(100)
            raise InterruptedError

    with Prefetch(slow, SLICES, 2, waiting, 10.0) as ahead:
        ahead.batch(*SLICES[0])
        assert signs == 3
        with pytest.raises(InterruptedError):
            ahead.batch(*SLICES[1])
        assert ahead.waited_s > 0.3


def test_nobody_waits_longer_than_the_limit() -> None:
    slow = Slow(0)

    def waiting() -> None:
        pass

    with Prefetch(slow, SLICES, 2, waiting, 0.15) as ahead:
        with pytest.raises(DataStalledError, match="expected samples 0 to 1 of step 1") as caught:
            ahead.batch(*SLICES[0])
        slow.allowed.release(100)
    assert caught.value.hint
