"""How process groups are called: ranks that call one the same are in it together."""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.protocol.ids import Rank

ALL = "all"
"""The group of all ranks."""
_OVER = ">"


def name_of(kind: str, members: Iterable[Rank | int]) -> str:
    """Return the name of a group: no other group of its kind has its first member.

    >>> name_of("tp", (6, 7))
    'tp@6'
    """
    return f"{kind}@{min(members)}"


def kind_of(name: str) -> str:
    """Return of what kind the group of a name is.

    >>> kind_of("tp@6")
    'tp'
    """
    return name.partition("@")[0]


def connection(kind: str, sender: Rank | int, receiver: Rank | int) -> str:
    """Return the name of what one rank sends another: not a collective, but waited for likewise.

    >>> connection("pp", 2, 6)
    'pp 2>6'
    """
    return f"{kind} {sender}{_OVER}{receiver}"


def is_connection(name: str) -> bool:
    """Whether messages are counted under this name, not collectives.

    A sender may be done with a message before it is received, and the two may wait for messages in
    another order. So how many either has waited for says who is waited for, but who waits for one
    waits for the other whatever that has counted.
    """
    return _OVER in name
