"""Events: everything that the controller is ever told, each a fact with the moment it was known.

`at` is in seconds on the run's clock. What an agent reports arrives as `Reported`, the agent's
own words (protocol.messages.Fact) stamped with the moment and the node that said them.
"""

from __future__ import annotations

import msgspec

from orchestrator.core.decisions import JudgeDevice
from orchestrator.core.standing import Standing
from orchestrator.core.trust import Onset, Verdict
from orchestrator.protocol.cutting import Cut
from orchestrator.protocol.ids import Generation, NodeId, Seconds, Serial, Step
from orchestrator.protocol.messages import (
    DetectorFailed,
    Fact,
    GroupCounts,
    Prepared,
    RanksTroubled,
    Reached,
    ShardsWritten,
    StateDiverged,
    StepReport,
)


class _Event(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An event; its tag in the journal is the name of its class."""

    at: Seconds


class ControllerStarted(_Event, frozen=True, kw_only=True):
    """A controller took over the run; the first one has incarnation 1."""

    incarnation: int


class CommitLeft(msgspec.Struct, frozen=True, array_like=True):
    """A checkpoint that a former life committed, whatever has become of it since."""

    step: Step
    epoch: Generation
    key: str
    verdicts: tuple[Verdict, ...] = ()
    """What was found for it."""


class DeviceKnown(msgspec.Struct, frozen=True, array_like=True):
    """Where a device stands, by the ledger of verdicts about devices."""

    serial: Serial
    standing: Standing
    why: str
    """Reason of the verdict that brought it there."""


class Inherited(_Event, frozen=True, kw_only=True):
    """A former life of the run has ended; this is what it knew (core.heritage).

    The first events of a later life, before its first controller took over: several if there is
    much to tell.
    """

    generation: Generation
    """The newest one of all former lives."""
    losses: tuple[tuple[Step, float | None], ...]
    """(step, loss), ascending; None for one that was not finite."""
    untold_step: Step
    """Up to here no journal tells of the steps that led to where it stood."""
    divergences: tuple[Step, ...] = ()
    digests_differ: tuple[Step, ...] = ()
    commits: tuple[CommitLeft, ...] = ()
    """The newest ones, oldest first."""
    onsets: tuple[Onset, ...] = ()
    """What must not be restored any more."""
    quarantined: tuple[tuple[NodeId, str], ...] = ()
    """(node, why), sorted: nobody has said yet that these may be used again."""
    devices: tuple[DeviceKnown, ...] = ()
    """What it knew of the device ledger, by serial, for the case that this can not be read."""
    judging: tuple[JudgeDevice, ...] = ()
    """Verdicts about devices that it ordered and does not know to be on record, in order."""


class Reported(_Event, frozen=True, kw_only=True):
    """An agent reported a fact about its node."""

    node: NodeId
    fact: Fact


class Together(_Event, frozen=True, kw_only=True):
    """Many nodes reported the same fact at the same moment. A world may always say it singly."""

    fact: Reached | Prepared | RanksTroubled | ShardsWritten
    """What each of them reported; of `ShardsWritten`, with the receipts of all of them."""
    nodes: tuple[NodeId, ...] = ()
    """Who; empty for every node of the generation that the fact is about."""


class CopiesHeld(_Event, frozen=True, kw_only=True):
    """Every node of a generation holds what its ranks staged after `step` steps.

    What `ShardsHeld` of every node would say of that step. It takes back nothing.
    """

    generation: Generation
    step: Step
    copied: bool
    """Whether their buddies hold it, too."""
    missing: tuple[NodeId, ...] = ()
    """Nodes that hold none of it."""
    uncopied: tuple[NodeId, ...] = ()
    """Nodes whose shards their buddy does not hold, if others' do."""


class NodeDisconnected(_Event, frozen=True, kw_only=True):
    """The connection to an agent closed. By itself no loss: it may be back at once."""

    node: NodeId


class NodeLost(_Event, frozen=True, kw_only=True):
    """The world knows that a node's agent is gone (its process ended, its pod was deleted)."""

    node: NodeId
    evidence: str


class Telemetry(_Event, frozen=True, kw_only=True):
    """One tick of the whole world. Columns are indexed by rank, -1 or "?" where unknown.

    A column of length one says the same of every rank.
    """

    generation: Generation
    heard: tuple[NodeId, ...]
    """Nodes that were heard since the last tick, sorted."""
    phases: tuple[int, ...]
    steps: tuple[int, ...]
    progress: tuple[int, ...]
    states: str
    cpu_s: tuple[float, ...]
    stall_s: float
    """Longest time, over the ranks, for which saving kept training waiting since the last tick."""
    entered: tuple[int, ...] = (-1,)
    """Collectives that each rank has entered in this generation."""
    left: tuple[int, ...] = (-1,)
    """Collectives that it has left; who has left fewer waits in one."""
    compute_s: tuple[float, ...] = (0.0,)
    """Seconds of a step that each rank computed, without waiting: of the newest steps, on average;
    0 if not measured."""
    busy_s: tuple[float, ...] = (0.0,)
    """Processor seconds of that; 0 if not known, or something else than a processor computes."""
    work: tuple[float, ...] = (0.0,)
    """What each rank computed in one of them, in a unit that all share; 0 if not said."""
    reports: tuple[StepReport, ...] = ()
    """Steps completed in this generation and not reported before, ascending."""
    since_step_s: float = 0.0
    """How long ago the last of them was complete."""
    watched_s: float = 0.0
    """For how long before this somebody watched, and had nothing to tell."""
    digests: tuple[tuple[Step, str], ...] = ()
    """Of the state that a step began with, and of its gradient, in hex, if all who hold a part of
    it had the same."""
    parts: tuple[tuple[Step, str], ...] = ()
    """What those digests are made of (detect.votes.parts_of_world), for whoever computes the steps
    once more, long after."""
    replayed: Step = Step(0)
    """Newest step of which the last micro-batch of every rank came out the same when another rank
    computed it once more; 0 if there is none that was not told before."""
    groups: tuple[GroupCounts, ...] = ()
    """In which collectives ranks of nodes stand, of which one has not moved for long."""


class Compared(_Event, frozen=True, kw_only=True):
    """Digests that ranks took of the same state are not the same, or could not be compared."""

    fact: StateDiverged | DetectorFailed


class CheckpointFound(_Event, frozen=True, kw_only=True):
    """The durable tier was searched: its newest verified checkpoint, and what was passed over."""

    step: Step | None
    epoch: Generation | None
    key: str
    """Commit record, "" if there is none."""
    rejected: tuple[str, ...] = ()
    """For each newer one: which it was and why it can not be used."""
    grade: Verdict | None = None
    """compute-verified, if such a one was asked for and there is one."""
    ungraded: tuple[str, ...] = ()
    """For each newer one that is not, if that was asked for: which, and how far it is trusted."""
    foreign: str = ""
    """What is there of another run; "" if nothing is."""
    reads: int = 0
    """How often the store was asked for anything."""
    shards: int = 0
    """How many shards the checkpoint has; 0 if there is none, or it was not said."""
    cut: Cut | None = None
    """How whoever wrote it was cut; None if there is none, or it was not said."""
    epoch_seen: Generation = Generation(0)
    """The newest epoch of which anything is there, however useless; 0 if nothing is."""
    generation: Generation = Generation(0)
    """Which one asked; 0 if it was not said, or before the first."""
    number: int = 0
    """Which search it answers; 0 if it was not said."""


class SearchFailed(_Event, frozen=True, kw_only=True):
    """The durable tier did not answer, which says nothing about what it holds."""

    reason: str
    again: bool = False
    """Whether it may answer later, with nothing changed."""
    generation: Generation = Generation(0)
    """Which one asked; 0 if it was not said, or before the first."""
    number: int = 0
    """Which search it answers; 0 if it was not said."""


class CheckpointCommitted(_Event, frozen=True, kw_only=True):
    """The commit record of a checkpoint exists."""

    step: Step
    epoch: Generation
    key: str


class CommitFailed(_Event, frozen=True, kw_only=True):
    """A checkpoint could not be committed."""

    step: Step
    epoch: Generation
    reason: str
    again: bool = False
    """Whether it may succeed later, with nothing changed."""


class CheckpointJudged(_Event, frozen=True, kw_only=True):
    """A verdict about a checkpoint is on record, beside it: it was ordered, or a scrub found it."""

    step: Step
    epoch: Generation
    verdict: Verdict
    reason: str


class FaultInjected(_Event, frozen=True, kw_only=True):
    """The harness is about to break something. Ground truth for reports; nobody decides on it."""

    index: int
    description: str
    target: str
    """Rank or node, in words; what an incident must name to have been right."""
    node: NodeId
    """Who carries it out; "" for the controller itself."""


class StopRequested(_Event, frozen=True, kw_only=True):
    """Somebody asked for the run to be stopped."""

    by: str


class DrainRequested(_Event, frozen=True, kw_only=True):
    """Somebody asked for nodes to be free of this run: for maintenance, or since they will be gone.

    Asked again, the newest word counts.
    """

    nodes: tuple[NodeId, ...]
    by: str
    reason: str = ""
    """Why, in their words; "" if they did not say."""
    within_s: float | None = None
    """Seconds until they will be taken, whatever runs there; None for as soon as is cheap."""
    late_s: float = 0.0
    """How many of them had passed before anybody took it up."""
    request: str = ""
    """Names what was asked: told again under this name, it is the same word, not a new one."""


class DrainCancelled(_Event, frozen=True, kw_only=True):
    """Somebody said that nodes may be used again: a drain is not needed any more, or it is over."""

    nodes: tuple[NodeId, ...]
    by: str


class DevicesKnown(_Event, frozen=True, kw_only=True):
    """The device ledger was read: when a controller takes over, and whenever somebody added to it.

    What the core knows of other runs and of operators comes from here alone, so a journal is enough
    to decide the same once more.
    """

    devices: tuple[DeviceKnown, ...] = ()
    """All that are not healthy as far as is known, by serial."""
    problem: str = ""
    """Why it is not known, or not all of it; "" if it is."""


class DeviceJudged(_Event, frozen=True, kw_only=True):
    """A verdict about a device is on record in the ledger, as it was ordered."""

    id: str
    """Of the order."""
    device: DeviceKnown
    """Where that brought it."""


class Tick(_Event, frozen=True, kw_only=True):
    """Time passed."""

    watched_s: float = 0.0
    """For how long before this somebody watched, and had nothing to tell."""


Event = (
    ControllerStarted
    | Inherited
    | Reported
    | Together
    | CopiesHeld
    | NodeDisconnected
    | NodeLost
    | Telemetry
    | Compared
    | CheckpointFound
    | SearchFailed
    | CheckpointCommitted
    | CommitFailed
    | CheckpointJudged
    | FaultInjected
    | StopRequested
    | DrainRequested
    | DrainCancelled
    | DevicesKnown
    | DeviceJudged
    | Tick
)
