"""The faults that only the rank itself can commit; a fault plan asks for them by name."""

import collections
import itertools
import os
import signal
import time

from orchestrator.protocol.rank import Misbehave

DETAILED = ("throttle",)
"""Those that take options."""
THROTTLE_S = 0.005
"""Of processor time, after which what a throttled rank has computed is made to take longer."""


class InjectedFaultError(Exception):
    """A fault plan told this rank to raise."""

    hint = "It was asked for: see `faults` in the fault plan."


class _Throttle:
    """Makes whatever the main thread computes take longer, as a slow processor would.

    It burns processor time and does not stop the process: one that sleeps for part of its time
    gets the processor sooner afterwards, and on a busy machine hardly loses any.

    Args:
        times: how much longer it takes.
    """

    def __init__(self, times: float) -> None:
        self._more = times - 1
        self._since = time.thread_time()
        self._burns = False

    def __call__(self, *_: object) -> None:
        if self._burns:
            return
        self._burns = True
        now = time.thread_time()
        until = now + self._more * (now - self._since)
        while time.thread_time() < until:
            pass
        self._since = time.thread_time()
        self._burns = False


def misbehave(order: Misbehave) -> None:
    """Do as ordered: `exception`, `spin`, `spin-holding-gil`, `block` or `throttle`. Main thread.

    Raises:
        InjectedFaultError: for `exception`.
        ValueError: for a name that is none of them.
    """
    match order.how:
        case "exception":
            raise InjectedFaultError("raised on the order of a fault plan")
        case "spin":
            while True:
                pass
        case "spin-holding-gil":
            # One endless call into C: no bytecode runs in between, so no other thread does.
            collections.deque(itertools.repeat(None), maxlen=0)
        case "block":
            reads, _writes = os.pipe()
            os.read(reads, 1)  # nobody writes: it never returns
        case "throttle":
            signal.signal(signal.SIGPROF, _Throttle(float(order.options["times"])))
            signal.setitimer(signal.ITIMER_PROF, THROTTLE_S, THROTTLE_S)
        case _:
            raise ValueError(f"unknown misbehaviour {order.how!r}")
