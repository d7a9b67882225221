"""A throttled rank: what its main thread computes takes longer, in processor time."""

import signal
import time
from collections.abc import Iterator

import pytest

from orchestrator.protocol.rank import Misbehave
from orchestrator.worker.misbehaviour import misbehave


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGPROF)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def spent_s() -> float:
    """Return what some work takes of the processor, the least of three times."""
    taken = []
    for _ in range(3):
        begun = time.thread_time()
        sum(range(1_000_000))
        for n in range(300_000):
            n * n
        taken.append(time.thread_time() - begun)
    return min(taken)


def test_what_a_throttled_rank_computes_takes_more_of_its_processor() -> None:
    plain_s = spent_s()

    misbehave(Misbehave(how="throttle", options={"times": 5.0}))

    assert spent_s() > 2 * plain_s


def test_a_name_that_is_no_misbehaviour_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown misbehaviour 'dance'"):
        misbehave(Misbehave(how="dance"))
