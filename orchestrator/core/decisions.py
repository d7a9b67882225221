"""Decisions: everything that the controller ever orders, each with its reason in words.

A decision is idempotent: a world that carries it out twice, or resumes half way, gets the same
result. Its order id is the sequence number of the event that caused it and its place among the
decisions of that event, so that it is the same in every replay.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from orchestrator.core.standing import Act, Actor, DeviceVerdict, Proof
from orchestrator.core.trust import Onset, Verdict
from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.devices import Device
from orchestrator.protocol.ids import Generation, IncidentId, NodeId, Rank, Seconds, Serial, Step
from orchestrator.protocol.messages import Receipt


class _Decision(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A decision; its tag in the journal is the name of its class."""

    generation: Generation
    reason: str
    incident: IncidentId | None = None


class RestoreFrom(msgspec.Struct, frozen=True, kw_only=True):
    """Where the state of a new generation comes from."""

    step: Step
    sources: tuple[str, ...]
    """Per rank: the node whose memory has its shard, or with `commit`: which reads it from the
    durable tier and then has it; "" for the durable tier itself."""
    commit: str = ""
    """Key of the commit record; "" if memory has everything."""
    staged_as: tuple[Rank, ...] = ()
    """Per rank: as whose the copy was staged, or is read, that is in that memory, if replicas take
    each other's; none if each has its own."""
    cut_anew: str = ""
    """From what into what that checkpoint is cut anew, in words: no rank's shard is in it, and each
    reads what is its own of all of them. "" if it is cut as the run is."""


class StartGeneration(_Decision, frozen=True, kw_only=True):
    """End whatever runs and start `generation` on these seats. Fences everybody else."""

    seats: tuple[NodeId, ...]
    """Node of each rank, indexed by rank."""
    dismiss: tuple[Rank, ...]
    """Ranks of the generation before whose process must not live on."""
    restore: RestoreFrom | None
    """None: from the seed."""
    buddies: dict[NodeId, NodeId]
    """Where each node of the world copies what its ranks stage."""
    cadence: Cadence | None = None
    """How often it saves, until something else is decided; None for as the run file says."""
    watched: tuple[NodeId, ...] = ()
    """Those of its nodes that are on probation: if there are any, ranks compute each other's last
    micro-batches in every step, where the run has that at all."""


class CatchUp(_Decision, frozen=True, kw_only=True):
    """Have a seated node that is behind begin the present generation: its order may be lost."""

    node: NodeId


class AnnounceRendezvous(_Decision, frozen=True, kw_only=True):
    """Tell every rank of the generation where its store listens."""

    address: str


class FenceNode(_Decision, frozen=True, kw_only=True):
    """Tell a node that has no seat to stop every rank of an older generation."""

    node: NodeId


class DisconnectNode(_Decision, frozen=True, kw_only=True):
    """Close the connection of a node that is not heard on it: it may come back on another."""

    node: NodeId


class SearchCheckpoints(_Decision, frozen=True, kw_only=True):
    """Find the newest verified checkpoint of the durable tier; answered by CheckpointFound."""

    number: int = 0
    """Counts the searches of a run; its answer names it."""
    onsets: tuple[Onset, ...] = ()
    """What came after these is not trusted: it is kept, and passed over now and ever after."""
    graded: Literal[True] | msgspec.UnsetType = msgspec.UNSET
    """True: one that is compute verified comes before newer ones that are not. Else it is not in
    the journal, so that those from before there was such a thing replay to the same bytes."""


class CommitCheckpoint(_Decision, frozen=True, kw_only=True):
    """Publish the commit record: all shards of `step` are written."""

    step: Step
    receipts: tuple[Receipt, ...]
    model: str


class AbandonCheckpoint(_Decision, frozen=True, kw_only=True):
    """Do not commit what is written of `step`: it can not be a state. Nothing else changes."""

    step: Step
    doubts: tuple[str, ...]
    """What is wrong: which shard or chunk, what was expected and what was found."""


class JudgeCheckpoint(_Decision, frozen=True, kw_only=True):
    """Put a verdict on record beside a checkpoint; answered by CheckpointJudged."""

    step: Step
    epoch: Generation
    verdict: Verdict


class RetainMemory(_Decision, frozen=True, kw_only=True):
    """State after `step` steps is held everywhere: older copies in memory may go."""

    step: Step


class SetCadence(_Decision, frozen=True, kw_only=True):
    """Save this often from now on. Ranks change over together, as rank 0 leads them."""

    node: NodeId
    """Of rank 0."""
    cadence: Cadence


class CarryOutFault(_Decision, frozen=True, kw_only=True):
    """The planned fault is on record: let it happen."""

    index: int
    node: NodeId


class ProbeRanks(_Decision, frozen=True, kw_only=True):
    """Have ranks measure how fast they are at the end of a step; each answers by RankProbed."""

    number: int
    """Its answers name it."""
    ranks: tuple[Rank, ...]
    nodes: tuple[NodeId, ...]
    """Of each."""
    within_s: float
    """Training stands still for no longer than this."""


class InspectRanks(_Decision, frozen=True, kw_only=True):
    """Have nodes say where their ranks stand, before a later decision moves them: StacksTaken."""

    nodes: tuple[NodeId, ...]
    suspects: tuple[Rank, ...]
    within_s: float
    """What comes after waits no longer than this."""


class JudgeDevice(_Decision, frozen=True, kw_only=True):
    """Put a verdict on record in the device ledger, for this run and all others: DeviceJudged."""

    id: str
    """Names it: ordered again under this name, it is the same verdict."""
    device: Device
    node: NodeId
    act: Act
    actor: Actor
    by: str
    """Who it was, in words."""
    proof: Proof = Proof.NONE

    def verdict(self, *, at: float, run: str = "") -> DeviceVerdict:
        """Return it as it is kept.

        Args:
            at: when it is put on record, seconds since 1970.
            run: which run says so.
        """
        return DeviceVerdict(
            serial=self.device.serial,
            act=self.act,
            actor=self.actor,
            by=self.by,
            reason=self.reason,
            proof=self.proof,
            kind=self.device.kind,
            model=self.device.model,
            run=run,
            incident=self.incident or "",
            node=self.node,
            at=at,
            id=self.id,
        )


class PreflightDevices(_Decision, frozen=True, kw_only=True):
    """Have a node compute what is known beforehand, before it gets a seat again: Preflighted."""

    node: NodeId
    serials: tuple[Serial, ...]
    within_s: float
    """For so long at most."""


class EndRun(_Decision, frozen=True, kw_only=True):
    """Stop everything, keep everything, and say how it ended."""

    state: str
    """Succeeded, Failed or Stopped."""


class WakeAt(_Decision, frozen=True, kw_only=True):
    """Send a Tick no later than `at`, whatever else happens."""

    at: Seconds


Decision = (
    StartGeneration
    | CatchUp
    | AnnounceRendezvous
    | FenceNode
    | DisconnectNode
    | SearchCheckpoints
    | CommitCheckpoint
    | AbandonCheckpoint
    | JudgeCheckpoint
    | RetainMemory
    | SetCadence
    | CarryOutFault
    | ProbeRanks
    | InspectRanks
    | JudgeDevice
    | PreflightDevices
    | EndRun
    | WakeAt
)
