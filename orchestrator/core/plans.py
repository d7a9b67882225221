"""What detectors and policies are to the controller, and what a policy may answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from orchestrator.core.decisions import RestoreFrom
from orchestrator.core.events import Event
from orchestrator.core.incident import Finding
from orchestrator.core.state import RunState
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import NodeId, Rank, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Give up (or stop), keeping everything."""

    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Wait before the restart."""

    until: Seconds
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitForNodes:
    """There are too few nodes; look again at `until` at the latest."""

    until: Seconds
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Ask the durable tier what it has."""

    reason: str
    graded: bool = False
    """Whether what is compute verified comes before what is newer."""
    at: Seconds | None = None
    """Not before this; None for at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Have nodes get no seat until somebody says that they may; then ask the rules again."""

    nodes: tuple[NodeId, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Start a new generation."""

    seats: tuple[NodeId, ...]
    dismiss: tuple[Rank, ...]
    restore: RestoreFrom | None
    buddies: dict[NodeId, NodeId]
    rung: str
    reason: str
    evicted: tuple[NodeId, ...] = ()
    """Those of the nodes without a seat from now on that left for suspicion alone."""


Plan = End | Pause | WaitForNodes | Search | Quarantine | Restart


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Save this often."""

    cadence: Cadence
    reason: str


class Pacer(Protocol):
    """Says how often to save; asked after each save that came about."""

    def __call__(self, state: RunState) -> Pace | None:
        """Return another cadence, or None while the present one is good."""
        ...


class Detector(Protocol):
    """Turns what is known into findings. Levels, not edges: it may repeat itself.

    `observe` is called after the event has been applied to the state. It may not raise; one
    that does is switched off and reported.
    """

    name: str

    def observe(self, state: RunState, event: Event) -> Sequence[Finding]:
        """Return what is wrong as of now, as far as this detector can tell."""
        ...


class Policy(Protocol):
    """One rule of recovery. Asked in order while a generation is wanted; the first answer wins."""

    def __call__(self, state: RunState) -> Plan | None:
        """Return what to do, or None if this rule has nothing to say."""
        ...
