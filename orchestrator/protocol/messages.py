"""What an agent and the controller say to each other, one JSON text per WebSocket message.

Up come *facts*, in the past tense; down go *orders*. A fact names the generation that it is
about, an order carries an id under which it is carried out at most once. Per-rank numbers
travel as columns over the node's ranks, never as a message per rank.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.devices import Device
from orchestrator.protocol.digests import Digests
from orchestrator.protocol.ids import Generation, NodeId, Rank, Serial, Step
from orchestrator.protocol.rank import Speed
from orchestrator.protocol.stacks import Stack
from orchestrator.protocol.timeouts import Timeouts

PROTOCOL_VERSION = 10
MESSAGE_MAX_BYTES = 8 << 20


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message; its tag is the name of its class."""


# Facts, from agents -------------------------------------------------------------------------

MARKS = ("ordered", "cleared", "seated", "formed", "restored", "stepped", "finished")
"""How far a node's ranks have come in a generation: the least advanced of them counts.

cleared: nothing of an older generation holds on any more; seated: every rank is a live process
that was given its seat; formed: process groups stand; restored: state is in place; stepped: the
first step of the generation is complete; finished: all steps are.
"""


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """This node's memory holds the verified shard that `rank` staged after `step` steps."""

    rank: Rank
    step: Step


class Joined(_Message, frozen=True, kw_only=True):
    """First message of every connection: who I am, and everything I know (level, not edge)."""

    node: NodeId
    version: int
    incarnation: int
    """Grows by one with each start of this node's agent."""
    pid: int
    peer_address: str
    """Where other agents fetch shards from this one, host:port."""
    generation: Generation
    """Newest generation that this node was part of; 0 for none."""
    mark: int
    """Index into MARKS for that generation."""
    ranks: tuple[Rank, ...] = ()
    holdings: tuple[Holding, ...] = ()
    offered: str = ""
    """Store address that a rank of this node offered for that generation."""
    lanes: tuple[tuple[int, int], ...] = ()
    """Per rank of `ranks`: its part of the state digest, once finished."""
    devices: tuple[Device, ...] = ()
    """What this node is made of, as far as its identity is known: the machine, and its GPUs."""
    devices_unknown: str = ""
    """Why that is not all of them; "" if it is."""


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """One completed step, as one rank of the node saw it. None stands for not finite."""

    step: Step
    loss: float | None
    grad_norm: float | None
    tokens: int
    seconds: float


class GroupCounts(msgspec.Struct, frozen=True, array_like=True):
    """How many collectives of a process group ranks of this node have entered and left."""

    group: str
    """Its name (protocol.groups): ranks that name the same one are in one."""
    ranks: tuple[Rank, ...]
    entered: tuple[int, ...]
    """By each of `ranks`."""
    left: tuple[int, ...]
    """One less than entered by who waits in one."""
    what: tuple[str, ...] = ()
    """What the last one is that each has entered; without it, nobody has said."""


class Beat(_Message, frozen=True, kw_only=True):
    """Periodic telemetry of one node. Columns are ordered like `ranks`."""

    generation: Generation
    ranks: tuple[Rank, ...]
    phases: tuple[int, ...]
    steps: tuple[int, ...]
    progress: tuple[int, ...]
    """Signs of life since the process began."""
    states: str
    """One letter per rank, the kernel's process state: R S D T Z, X for gone."""
    cpu_s: tuple[float, ...]
    """Processor seconds used so far."""
    stall_s: tuple[float, ...]
    """Seconds for which saving kept training waiting so far."""
    entered: tuple[int, ...] = ()
    """Collectives entered in this generation; -1 if the rank has no seat in it yet."""
    left: tuple[int, ...] = ()
    """Collectives left; who has left fewer than entered waits in one."""
    compute_s: tuple[float, ...] = ()
    """Seconds of a step spent computing, without waiting for peers: of the newest steps, on
    average; 0 if not measured."""
    busy_s: tuple[float, ...] = ()
    """Processor seconds of that; 0 if not known, or something else than a processor computes."""
    work: tuple[float, ...] = ()
    """What was computed in one of them, in a unit that all ranks share; 0 if not said."""
    reports: tuple[StepReport, ...] = ()
    digests: tuple[Digests, ...] = ()
    """Those that were not said before, ascending."""
    groups: tuple[GroupCounts, ...] = ()
    """Said of all ranks of the node once any of them has not moved for long: nobody needs it of
    ranks that move, and of those it would be most of what is said."""


class Reached(_Message, frozen=True, kw_only=True):
    """All ranks of this node have come at least as far as `mark` in this generation."""

    generation: Generation
    mark: int


class MendedCopy(msgspec.Struct, frozen=True, array_like=True):
    """A copy in a node's memory of which some bytes were bad, and were brought anew."""

    rank: Rank
    origin: NodeId
    """Whose memory had them; "" for the durable tier, "here" for a header, which is made anew."""
    chunks: int
    size: int
    """Bytes of those chunks."""
    what: str
    """Of the first of them: what was found, what was expected, its name."""
    sender: NodeId = NodeId("")
    """Who had sent it so, intact as it was there or not; "" if it went bad here."""


class BadCopy(msgspec.Struct, frozen=True, array_like=True):
    """A copy in memory that was found by another node not to be what was staged."""

    node: NodeId
    """Whose memory has it."""
    rank: Rank
    """Who staged it."""
    step: Step
    what: str
    """What was found, what was expected, which chunk."""


class Prepared(_Message, frozen=True, kw_only=True):
    """The state of every rank of this node lies in its memory, ready to be restored."""

    generation: Generation
    step: Step
    own: int
    """Ranks whose shard was already here."""
    fetched: int
    """Ranks whose shard came from another node's memory."""
    durable: int
    """Ranks whose shard was read from the durable tier."""
    reads: int = 0
    """How often the durable tier was asked for anything meanwhile, for a rank or in vain."""
    seconds: float
    mended: tuple[MendedCopy, ...] = ()
    """What of this node's own memory was not what had been staged, and is again."""
    lacking: tuple[BadCopy, ...] = ()
    """Copies in other nodes' memories that were no good when something was to be mended."""


class FailedCopy(msgspec.Struct, frozen=True, array_like=True):
    """A copy in memory from which a rank could not start."""

    node: NodeId
    """Who was to have it; of no-room: who was to take it."""
    rank: Rank
    kind: Literal["corrupt", "absent", "unreachable", "no-room"]
    """corrupt: its bytes are not what was staged; absent: it is not there, or not any more;
    unreachable: it could not be fetched from there; no-room: there is no memory to fetch it to."""


class PreparationFailed(_Message, frozen=True, kw_only=True):
    """The state could not be brought here; the generation can not start from it."""

    generation: Generation
    step: Step
    tier: str
    reason: str
    copies: tuple[FailedCopy, ...] = ()
    """Which copies in memory failed; none, if it is not known to be about one."""


class RendezvousOffered(_Message, frozen=True, kw_only=True):
    """Rank 0 of this generation runs the store at this address."""

    generation: Generation
    address: str


class RankExited(_Message, frozen=True, kw_only=True):
    """A rank's process ended without having been told to, or was killed while it left."""

    generation: Generation
    rank: Rank
    pid: int
    code: int
    """Exit code; minus the signal's number if a signal ended it."""
    phase: int
    step: Step
    kind: str = ""
    """Class of the exception that ended it, if it could still say."""
    message: str = ""
    traceback: str = ""
    misconfigured: bool = False
    unrestorable: bool = False


class RanksTroubled(_Message, frozen=True, kw_only=True):
    """Collectives failed under these ranks: a symptom, whose cause lies elsewhere."""

    generation: Generation
    ranks: tuple[Rank, ...]
    message: str


class ShardsHeld(_Message, frozen=True, kw_only=True):
    """This node's memory holds these shards, its own ranks' and copies for others, and no more."""

    generation: Generation
    holdings: tuple[Holding, ...]
    renewed: tuple[Holding, ...] = ()
    """Those of them that came, verified, in place of another copy of the same."""


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """One shard on the durable tier."""

    shard: int
    size: int
    index_digest: str


class Impression(msgspec.Struct, frozen=True, array_like=True):
    """What a staged shard looks like, in few bytes (agent.impressions)."""

    shard: int
    boxes: str
    """xxh3-64 of which boxes of which tensors it holds."""
    content: str
    """xxh3-128 of the digests of all its chunks; equal if, and only if, their bytes are."""
    moving: str
    """The same of the optimizer's; "" if it has none, or they are all zero."""
    extra: str
    """xxh3-64 of what lies beside the tensors: counters of the step, the same in every shard."""
    bad: tuple[str, ...] = ()
    """Chunks in which numbers are not finite, the first ones."""
    rms: float = -1.0
    """Root of the mean square of its weights; -1 if that was not looked at."""
    gap: int = 0
    """By how much its boxes miss what they should have; of all shards together, 0
    (storage/coverage.py)."""


class ShardsStaged(_Message, frozen=True, kw_only=True):
    """Ranks of this node have staged shards that other replicas write: these are the same ones."""

    generation: Generation
    step: Step
    impressions: tuple[Impression, ...]


class ShardsWritten(_Message, frozen=True, kw_only=True):
    """The shards that this node owes the durable tier for `step` are there."""

    generation: Generation
    step: Step
    receipts: tuple[Receipt, ...]
    model: str
    """Fingerprint of the model that the shards belong to."""
    impressions: tuple[Impression, ...] = ()
    """One for each shard, or none."""


class WriteFailed(_Message, frozen=True, kw_only=True):
    """This node could not write what it owes for `step`, or a rank of it could not stage it.

    It tries again to write while nothing newer is due, so `ShardsWritten` may follow; said once per
    step.
    """

    generation: Generation
    step: Step
    reason: str


class RanksFinished(_Message, frozen=True, kw_only=True):
    """All ranks of this node are done. Lanes: per rank, its part of the state digest."""

    generation: Generation
    step: Step
    ranks: tuple[Rank, ...]
    lanes: tuple[tuple[int, int], ...]


class NodeUnusable(_Message, frozen=True, kw_only=True):
    """This node can not be used any more, for example a process survived SIGKILL."""

    reason: str
    serial: Serial = Serial("")
    """Which of its devices the error of the hardware is of; "" if it is none, or not known."""


class Symptom(msgspec.Struct, frozen=True, array_like=True):
    """Something that a node's hardware says of itself, and that holds now."""

    name: str
    """In the agent's table of signals."""
    device: str
    """As the kernel names it; "" if it does not."""
    serial: Serial
    """Of which of its devices; "" if it is none, or not known."""
    drain: bool
    """Whether the node is to give its seats to a spare for it, when that costs least."""
    words: str


class NodeAiling(_Message, frozen=True, kw_only=True):
    """What this node's hardware says of itself now; what is not named is over."""

    symptoms: tuple[Symptom, ...] = ()
    unread: tuple[str, ...] = ()
    """Why not all of the hardware is read; none if it is."""
    lacking: tuple[str, ...] = ()
    """What is not installed here that more of it would be read with: a choice, and no fault."""


class StateDiverged(_Message, frozen=True, kw_only=True):
    """The training state is not what it should be, and nothing raised an error.

    Digests that differ, a step that came out differently when it was computed again.
    """

    generation: Generation
    """The one in which it was found."""
    step: Step
    """After which it was found."""
    since: Step | None
    """The last step whose state is known to be good, since it was verified; None if none is."""
    nodes: tuple[NodeId, ...] = ()
    """Suspects, the most suspected first; none if nobody stands out, or they are `ranks`."""
    ranks: tuple[Rank, ...] = ()
    """Ranks of this generation by which it showed."""
    evidence: str
    proven: bool = False
    """Whether a replay elsewhere or a vote shows that it was these nodes; else it is a trigger."""
    of_data: bool = False
    """Whether it is what these nodes read, and not what they compute on."""


class StateRepaired(_Message, frozen=True, kw_only=True):
    """The state of a rank was not what most hold alike, which showed before a step used it.

    It was given what the others hold, compared once more, and the step was begun anew. Or it came
    to other bits when it updated a part of its state a second time, and kept what came out twice.
    """

    generation: Generation
    step: Step
    """The step, which had moved nothing yet."""
    ranks: tuple[Rank, ...] = ()
    """Whose it was; none if it was not repaired."""
    source: Rank = Rank(0)
    """Who had what it was given; the rank itself, if it has computed that."""
    tensors: tuple[str, ...] = ()
    """What it was given, the first of it; none if only a digest or the gradient differed."""
    count: int = 0
    """Tensors that it was given."""
    seconds: float = 0.0
    """Since the step began: they are spent again."""
    problem: str = ""
    """Why it was not repaired; "" if it was."""
    begun: bool = False
    """Whether it is about to be, and nothing is known yet: whoever dies of it tells no more."""


class DetectorFailed(_Message, frozen=True, kw_only=True):
    """What looks for wrong state raised, and is switched off; training goes on without it."""

    generation: Generation
    ranks: tuple[Rank, ...]
    """On which; none: where what ranks say is compared."""
    detector: str
    reason: str


class RankProbed(_Message, frozen=True, kw_only=True):
    """A rank measured how fast its device is, as it was told to."""

    generation: Generation
    number: int
    rank: Rank
    speed: Speed


class LinkTimed(_Message, frozen=True, kw_only=True):
    """How fast copies of this node's shards reach its buddy, the median of the last few."""

    generation: Generation
    to: NodeId
    bytes_per_s: float
    copies: int


class StacksTaken(_Message, frozen=True, kw_only=True):
    """Where the ranks of this node stand, as the controller asked."""

    generation: Generation
    stacks: tuple[Stack, ...]
    problem: str = ""
    """Why not all of them are known; "" if they are."""


class Preflighted(_Message, frozen=True, kw_only=True):
    """This node computed what is known beforehand, as it was told to, and compared."""

    serials: tuple[Serial, ...]
    """Of which devices it was to be told."""
    compared: int
    """How many answers were."""
    wrong: str = ""
    """The first that was not what it must be; "" if all were."""
    problem: str = ""
    """Why nothing could be compared; "" if something was."""


class FaultDue(_Message, frozen=True, kw_only=True):
    """A planned fault is due here; it is carried out only when the controller has noted it."""

    index: int


class FaultCarriedOut(_Message, frozen=True, kw_only=True):
    """A planned fault was carried out, or could not be (and why)."""

    index: int
    problem: str = ""


Fact = (
    Reached
    | Prepared
    | PreparationFailed
    | RendezvousOffered
    | RankExited
    | RanksTroubled
    | ShardsHeld
    | ShardsStaged
    | ShardsWritten
    | WriteFailed
    | RanksFinished
    | NodeUnusable
    | NodeAiling
    | StateDiverged
    | StateRepaired
    | DetectorFailed
    | RankProbed
    | LinkTimed
    | StacksTaken
    | Preflighted
    | FaultDue
    | FaultCarriedOut
    | Joined
)
FromAgent = Fact | Beat


# Orders, to agents --------------------------------------------------------------------------


class Welcome(_Message, frozen=True, kw_only=True):
    """First answer to `Joined`: the terms of this run."""

    run: str
    run_id: str
    version: int
    timeouts: Timeouts
    checkpoint_uri: str
    entrypoint: str
    job: dict[str, Any]
    steps_known: Step
    """Steps up to here need not be reported again."""


class Ancestor(msgspec.Struct, frozen=True, array_like=True):
    """An older generation that is continued: what it staged counts up to step `last`."""

    generation: Generation
    last: Step


class Begin(_Message, frozen=True, kw_only=True):
    """Start (or take part in) generation `generation`; everything older is over.

    An agent gets the part that is about its own ranks: what it costs to tell every node of the
    whole world grows with the square of the world.
    """

    order: str
    generation: Generation
    world_size: int
    """How many ranks the world has."""
    ranks: tuple[Rank, ...]
    """Which of them this is about, ascending; `seats`, `sources`, `staged_as` and `shard_of` are
    columns over these."""
    seats: tuple[NodeId, ...]
    """The node of each."""
    dismiss: tuple[Rank, ...] = ()
    """Ranks of the generation before whose process may not go on, whatever it says: it is killed
    and started anew."""
    buddies: dict[NodeId, NodeId] = {}
    """Where each of the nodes copies what its ranks stage."""
    peers: dict[NodeId, str] = {}
    """Address of each node that is called for fetching and copying shards."""
    restore: Step | None = None
    """Steps of the state to continue from; None starts from the seed."""
    ancestors: tuple[Ancestor, ...] | None = None
    """All older generations whose states count; None: every one, up to step `restore`.

    A node that missed a generation may hold the same steps of one that was abandoned.
    """
    sources: tuple[str, ...] = ()
    """The node whose memory has the shard of each, or "" for the durable tier; none without
    `restore`. With `commit`: the node that reads it there, so that others need not."""
    staged_as: tuple[Rank, ...] = ()
    """As whose that shard was staged, or is read: of replicas, any one's will do. None if each is
    its own."""
    commit: str = ""
    """Key of the commit record when any shard comes from the durable tier."""
    shard_of: tuple[int, ...]
    """Which durable shard is the own of each."""
    cut_anew: bool = False
    """Whether the checkpoint of `commit` is cut otherwise: its shards are nobody's own, and each
    rank reads what it needs of it."""
    cadence: Cadence | None = None
    """How often ranks save in the beginning; None for as the run file says."""
    watched: bool = False
    """Whether ranks compute each other's last micro-batches in every step, where they do at all."""
    writers: tuple[Rank, ...]
    """Those that write their shard to the durable tier: of ranks with the same, the lowest."""

    def ranks_of(self, node: NodeId) -> tuple[Rank, ...]:
        """Return the ranks that have their seat on a node, ascending."""
        return tuple(r for r, seat in zip(self.ranks, self.seats, strict=True) if seat == node)


class Announce(_Message, frozen=True, kw_only=True):
    """The store of this generation listens at `address`."""

    order: str
    generation: Generation
    address: str


class Fence(_Message, frozen=True, kw_only=True):
    """You are not part of `generation`: stop every rank of an older one, keep your memory."""

    order: str
    generation: Generation
    restore: Step | None = None
    """As in `Begin`."""
    ancestors: tuple[Ancestor, ...] | None = None
    """As in `Begin`, but None leaves everything in memory."""


class Retain(_Message, frozen=True, kw_only=True):
    """State after `step` steps is safe in memory everywhere; older copies may go."""

    order: str
    generation: Generation
    step: Step


class SaveEvery(_Message, frozen=True, kw_only=True):
    """Have the world save this often from now on.

    Only the node of rank 0 is told: ranks change over together, at the step that rank 0 says.
    """

    order: str
    generation: Generation
    cadence: Cadence


class Farewell(_Message, frozen=True, kw_only=True):
    """The run is over: end the ranks, free the memory, exit."""

    order: str
    reason: str


class CarryOut(_Message, frozen=True, kw_only=True):
    """Carry out planned fault `index` now."""

    order: str
    index: int


class Probe(_Message, frozen=True, kw_only=True):
    """Have ranks of this node measure how fast they are, at the end of a step."""

    order: str
    generation: Generation
    number: int
    ranks: tuple[Rank, ...]
    within_s: float
    """Each of them takes no longer than this."""
    begins_s: tuple[float, ...]
    """Each waits for so long before: ranks that share a machine would take each other's cores."""


class Inspect(_Message, frozen=True, kw_only=True):
    """Say where the ranks of this node stand, before any later order makes them move."""

    order: str
    generation: Generation
    suspects: tuple[Rank, ...]
    """Of whom native frames are wanted too; a few."""
    within_s: float
    """A later order waits no longer than this."""


class Preflight(_Message, frozen=True, kw_only=True):
    """Compute what is known beforehand on these devices, and say whether it came out so."""

    order: str
    serials: tuple[Serial, ...]
    within_s: float
    """For so long at most."""


class Arm(_Message, frozen=True, kw_only=True):
    """Watch for the moments at which these planned faults are due (faults.plan.Fault as data)."""

    order: str
    faults: tuple[dict[str, Any], ...]


ToAgent = (
    Welcome
    | Begin
    | Announce
    | Fence
    | Retain
    | SaveEvery
    | Farewell
    | CarryOut
    | Probe
    | Inspect
    | Preflight
    | Arm
)

encode = msgspec.json.Encoder().encode
_from_agent: msgspec.json.Decoder[FromAgent] = msgspec.json.Decoder(FromAgent)
_to_agent: msgspec.json.Decoder[ToAgent] = msgspec.json.Decoder(ToAgent)


def read_from_agent(text: bytes | str) -> FromAgent:
    """Decode a fact or beat. Raises msgspec.DecodeError if it is neither."""
    try:
        return _from_agent.decode(text)
    except (UnicodeDecodeError, RecursionError) as error:  # which msgspec lets pass as they are
        raise msgspec.DecodeError(str(error)) from error


def read_to_agent(text: bytes | str) -> ToAgent:
    """Decode an order. Raises msgspec.DecodeError if it is none."""
    return _to_agent.decode(text)
