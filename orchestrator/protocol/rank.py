"""What an agent and the ranks it started say to each other, over one inherited socket.

The socket is a stream; each message is a 4-byte little-endian length and that many bytes of
JSON. It is created by the agent and inherited by the rank, so holding it is the permission to
speak on it: there is no address that anybody else could connect to.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from orchestrator.protocol.cadence import Cadence
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step

CONTROL_FD_VARIABLE = "HOLDFAST_CONTROL_FD"
BEACON_VARIABLE = "HOLDFAST_BEACON"
MEMORY_VARIABLE = "HOLDFAST_MEMORY"
STAND_BY_VARIABLE = "HOLDFAST_STAND_BY"
"""Set for a process that is made for no seat yet; it has the time to rehearse."""
"""Folder in shared memory where the rank makes its staging slots; owned by its agent."""

FRAME_MAX_BYTES = 8 << 20
_LENGTH = struct.Struct("<I")


class ProtocolError(Exception):
    """A peer sent bytes that are not a message of this protocol."""

    hint = "Both ends must run the same version of holdfast."


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint of the durable tier, all of it."""

    uri: str
    """Address of the store."""
    commit: str
    """Key of its record there."""


class Restore(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank finds the state it has to continue from: a verified slot of its agent."""

    step: Step
    path: str
    """The slot, a file in shared memory that holds one shard body (storage/FORMAT.md)."""
    index: str
    """The shard index as JSON text: byte ranges and digests of every chunk of the body."""
    whole: Whole | None = None
    """A checkpoint that was cut otherwise, of which the rank reads what is its own; then there is
    no slot, and no index. Only the embedded trainer is told to."""


class Seat(msgspec.Struct, frozen=True, kw_only=True, tag="seat"):
    """To a rank: this is your place in generation `generation`."""

    generation: Generation
    rank: Rank
    world_size: int
    local_rank: int
    node: NodeId
    run_id: str
    job: dict[str, Any]
    """`spec.trainer`, `spec.parallelism` (always with dpShard) and `spec.checkpoint` of the run."""
    restore: Restore | None = None
    cadence: Cadence | None = None
    """How often to save, in the beginning; None for as `job` says."""
    watched: bool = False
    """Whether somebody in the world is on probation: what is compared now and then, by `job`, is
    compared in every step."""
    free_slots: tuple[int, ...] = ()
    """Staging slots the rank may write to; others hold generations that may be needed."""
    cache_dir: str = ""
    """A folder of this node that outlives the rank, for what is expensive to derive."""
    log: str = ""
    """File to which this rank's output is appended from now on; "" leaves it where it goes."""
    abort_within_s: float = 1.0
    """A rank that has not left its world this long after `Abort` is killed."""
    persist_within_s: float = 60.0
    """At its end, a rank waits this long for its last state to become durable."""
    save_within_s: float = 60.0
    """A save that is not copied so long after it was begun is given up."""
    collective_timeout_s: float = 600.0
    """Back-stop of a collective; longer than every detector, so that it decides nothing."""


class JobAhead(msgspec.Struct, frozen=True, kw_only=True, tag="job-ahead"):
    """To a process without a seat: what its seat will be of, if it ever gets one."""

    job: dict[str, Any]
    """As in `Seat`."""
    cache_dir: str
    """As in `Seat`."""


class Rendezvous(msgspec.Struct, frozen=True, kw_only=True, tag="rendezvous"):
    """To a rank: the store of this generation listens at `address` (host:port)."""

    generation: Generation
    address: str


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """To a rank: leave the world of every generation older than `before`, keep your process."""

    before: Generation


class Parked(msgspec.Struct, frozen=True, kw_only=True, tag="parked"):
    """To a process that left its seat: no seat follows now; hold nothing of the one you had."""


class SlotFreed(msgspec.Struct, frozen=True, kw_only=True, tag="slot-freed"):
    """To a rank: this staging slot may be written again."""

    slot: int


class Persisted(msgspec.Struct, frozen=True, kw_only=True, tag="persisted"):
    """To a rank: its staged shard of `step` is on the durable tier."""

    step: Step
    given_up: bool = False
    """It is not, and will not be."""


class SaveEvery(msgspec.Struct, frozen=True, kw_only=True, tag="save-every"):
    """To rank 0: have the world save this often, from a step on at which all ranks know of it."""

    generation: Generation
    cadence: Cadence


class Misbehave(msgspec.Struct, frozen=True, kw_only=True, tag="misbehave"):
    """To a rank: fail in this way at your next phase change. Only a fault plan sends this."""

    how: str
    """One of `worker.misbehaviour`, or what the program in the rank takes itself."""
    options: dict[str, str | int | float] = {}
    """Details, of what has any."""


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe"):
    """To a rank: say how fast you are, at the end of your step; answered by `Probed`."""

    generation: Generation
    number: int
    within_s: float
    """Measure for no longer than this."""
    begins_s: float
    """Wait for so long before."""


class Retire(msgspec.Struct, frozen=True, kw_only=True, tag="retire"):
    """To a rank: there is no further seat for you; exit with code 0."""


ToRank = (
    Seat
    | JobAhead
    | Rendezvous
    | Abort
    | Parked
    | SlotFreed
    | Persisted
    | SaveEvery
    | Misbehave
    | Probe
    | Retire
)


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """From rank 0: my store for this generation listens at `address`."""

    generation: Generation
    address: str


class Reached(msgspec.Struct, frozen=True, kw_only=True, tag="reached"):
    """From a rank: a mark on the way into a generation, sent at once (the beacon is polled).

    `left` (waits for a seat), `formed` (process group stands), `restored` (state is in place),
    `stepped` (first step of this generation completed).
    """

    generation: Generation
    mark: str


class Staged(msgspec.Struct, frozen=True, kw_only=True, tag="staged"):
    """From a rank: slot `slot` holds my whole shard of `step`, digested."""

    generation: Generation
    step: Step
    slot: int
    index: str
    durable: bool
    """Whether this step is due on the durable tier too."""


class Abandoned(msgspec.Struct, frozen=True, kw_only=True, tag="abandoned"):
    """From a rank: of `step` I stage nothing after all; I train on."""

    generation: Generation
    step: Step
    reason: str


class Troubled(msgspec.Struct, frozen=True, kw_only=True, tag="troubled"):
    """From a rank: a collective failed under me; I wait to be told where to go."""

    generation: Generation
    message: str


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """From a rank: all steps are done. Lanes are this rank's part of the state digest."""

    generation: Generation
    step: Step
    lanes: tuple[int, int]


class Died(msgspec.Struct, frozen=True, kw_only=True, tag="died"):
    """From a rank, on its way out: the exception that ends it. The exit itself is seen apart."""

    generation: Generation
    kind: str
    """Qualified name of the exception class."""
    message: str
    traceback: str
    misconfigured: bool = False
    """The job as written can not run; starting it again can not help."""
    unrestorable: bool = False
    """The store would not give it the state that it was to go on from; the job is not at fault."""


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """How fast a device is, as a rank measured on it; 0 for what was not measured."""

    operations: float
    """Of products of matrices, per second."""
    copied: float
    """Bytes copied from memory to memory, per second."""
    problem: str = ""
    """Why it could not be measured."""
    busy_operations: float = 0.0
    """The same per second of a processor's time: what else runs on it does not count."""
    busy_copied: float = 0.0


class Probed(msgspec.Struct, frozen=True, kw_only=True, tag="probed"):
    """From a rank: the answer to `Probe`."""

    generation: Generation
    number: int
    speed: Speed


class Diverged(msgspec.Struct, frozen=True, kw_only=True, tag="diverged"):
    """From a rank: ranks found together that one of them computes wrongly."""

    generation: Generation
    step: Step
    """After which it was found."""
    since: Step
    """The last step whose state is known to be good."""
    ranks: tuple[Rank, ...]
    """Who did, or may have."""
    proven: bool
    evidence: str
    of_data: bool = False
    """Whether it is what they read, and not what they compute on."""


class Repaired(msgspec.Struct, frozen=True, kw_only=True, tag="repaired"):
    """From a rank: ranks found together that the state of one differs, and what they did."""

    generation: Generation
    step: Step
    """Before which moved anything."""
    ranks: tuple[Rank, ...] = ()
    """Who had something else; none if nobody can say, or nothing was repaired."""
    source: Rank = Rank(0)
    """Whose state it has now; its own, if it has computed that again."""
    tensors: tuple[str, ...] = ()
    """What was copied, by kind and name; none if the state was the same after all."""
    seconds: float = 0.0
    """That are spent again, for this."""
    problem: str = ""
    """Why it was not repaired; "" if it was."""
    begun: bool = False
    """Whether it is about to be, and nothing is known yet."""


class DetectorOff(msgspec.Struct, frozen=True, kw_only=True, tag="detector-off"):
    """From a rank: it goes on without something that looks for wrong state, since that raised."""

    generation: Generation
    detector: str
    reason: str


FromRank = (
    Offer
    | Reached
    | Staged
    | Abandoned
    | Troubled
    | Finished
    | Died
    | Probed
    | Diverged
    | Repaired
    | DetectorOff
)

_to_rank: msgspec.json.Decoder[ToRank] = msgspec.json.Decoder(ToRank)
_from_rank: msgspec.json.Decoder[FromRank] = msgspec.json.Decoder(FromRank)
_encode = msgspec.json.Encoder().encode


def frame(message: ToRank | FromRank) -> bytes:
    """Return the bytes of one message, length first.

    Raises:
        ProtocolError: if the message is larger than `FRAME_MAX_BYTES`.
    """
    body = _encode(message)
    if len(body) > FRAME_MAX_BYTES:
        raise ProtocolError(f"message of {len(body)} bytes, limit {FRAME_MAX_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Framer:
    """Cuts a byte stream into message bodies; feed it whatever `recv` returned."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the bodies completed by `data`, in order.

        Raises:
            ProtocolError: if a length exceeds the cap; the stream can not be read on.
        """
        self._buffer += data
        bodies: list[bytes] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > FRAME_MAX_BYTES:
                raise ProtocolError(f"frame announces {length} bytes, limit {FRAME_MAX_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[_LENGTH.size : end]))
            del self._buffer[:end]
        return bodies


def read_to_rank(body: bytes) -> ToRank:
    """Decode a message that an agent sent. Raises ProtocolError if it is not one."""
    try:
        return _to_rank.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"from agent: {error}") from error


def read_from_rank(body: bytes) -> FromRank:
    """Decode a message that a rank sent. Raises ProtocolError if it is not one."""
    try:
        return _from_rank.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"from rank: {error}") from error
