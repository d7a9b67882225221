"""The faults that only the rank itself can commit; a fault plan asks for them by name."""

import collections
import itertools


class InjectedFaultError(Exception):
    """A fault plan told this rank to raise."""

    hint = "It was asked for: see `faults` in the fault plan."


def misbehave(how: str) -> None:
    """Fail in the named way: `exception`, `spin` or `spin-holding-gil`.

    Raises:
        InjectedFaultError: for `exception`.
        ValueError: for a name that is none of them.
    """
    match how:
        case "exception":
            raise InjectedFaultError("raised on the order of a fault plan")
        case "spin":
            while True:
                pass
        case "spin-holding-gil":
            # One endless call into C: no bytecode runs in between, so no other thread does.
            collections.deque(itertools.repeat(None), maxlen=0)
        case _:
            raise ValueError(f"unknown misbehaviour {how!r}")
