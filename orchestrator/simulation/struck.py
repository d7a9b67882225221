"""What was let loose on a run, as it went: the truth that its accounts are drawn up from."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.protocol.ids import NodeId, Seconds
from orchestrator.simulation.signs import Sort


@dataclass(slots=True, kw_only=True)
class Struck:
    """One fault that was let loose."""

    at: Seconds
    name: str
    """Its class; or what came of another: false-eviction, relapse."""
    sort: Sort
    nodes: tuple[NodeId, ...] = ()
    found_at: Seconds | None = None
    """Of wrong numbers: when somebody knew of them, and undid what came of them."""
    hidden_s: float = 0.0
    """How long nobody knew, by the habits of the profile, while training stood still."""
    until: Seconds | None = None
    """Of a node that is slow: when it is as fast as it should be again, if nobody repairs it."""
