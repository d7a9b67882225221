"""How fast a processor is, whoever else wants it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import pytest

from orchestrator.protocol.rank import Misbehave
from orchestrator.worker import probing
from orchestrator.worker.misbehaviour import misbehave

STRETCH_S = 0.2


@pytest.fixture
def throttle() -> Iterator[Callable[[float], None]]:
    before = signal.getsignal(signal.SIGPROF)
    yield lambda times: misbehave(Misbehave(how="throttle", options={"times": times}))
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


@pytest.fixture
def rival() -> Iterator[subprocess.Popen[bytes]]:
    """Another program that always wants the core that this thread is on, and no other."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield other
    other.kill()
    other.wait()
    os.sched_setaffinity(0, allowed)


def measured(do: Callable[[], object]) -> tuple[float, float]:
    """Return how often something is done per second, by the wall clock and in processor time."""
    work = probing.Work(do, probing.COMPUTING_S)
    probing.in_turn([work], STRETCH_S)
    return work.elapsed, median(work.rounds)


def count() -> None:
    sum(range(2000))


def test_a_throttled_processor_shows_by_as_much_as_it_is_slow(
    throttle: Callable[[float], None],
) -> None:
    def speed(times: float) -> float:
        throttle(times)
        return measured(count)[1]

    # In turn, and each of them first as often: the machine is not as fast at any time.
    ratios = [speed(1.0) / speed(1.5) for _ in range(8)]
    ratios += [1 / (speed(1.5) / speed(1.0)) for _ in range(8)]

    assert 1.25 < median(ratios) < 1.8, ratios


def test_another_program_on_the_same_core_does_not_show_in_processor_time(
    rival: subprocess.Popen[bytes],
) -> None:
    def speeds(told: int) -> tuple[float, float]:
        rival.send_signal(told)
        return measured(count)

    # In turn, since the machine is not as fast at any time.
    rounds = [(speeds(signal.SIGSTOP), speeds(signal.SIGCONT)) for _ in range(5)]

    beside = [elapsed / alone for (alone, _), (elapsed, _) in rounds]
    assert median(beside) < 0.8, "half of a core at most"
    in_processor_time = [busy / alone for (_, alone), (_, busy) in rounds]
    assert 1 / 1.3 < median(in_processor_time) < 1.3, "its time counts as if it had all of it"


def test_a_process_that_is_stopped_shows_by_the_wall_clock_and_not_in_processor_time() -> None:
    def nap() -> None:
        count()
        time.sleep(0.001)

    elapsed, busy = measured(nap)

    assert elapsed < 0.7 * busy


def test_a_measurement_keeps_to_its_time_and_measures_both_in_both_ways() -> None:
    begun = time.monotonic()
    speed = probing.measure(0.5)

    assert time.monotonic() - begun < 1.0  # 0.42 s, and what a busy machine adds
    assert min(speed.operations, speed.copied, speed.busy_operations, speed.busy_copied) > 0
    assert speed.busy_copied >= speed.copied
