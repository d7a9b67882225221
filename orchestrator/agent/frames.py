"""What agents say to each other about shards: eight messages, in frames, and errors by their names.

A frame is 4 bytes of little-endian length and a message in msgpack, of 4 KiB at most. A shard
passes like this, whether its holder offers it by itself (a copy) or was asked for it (a fetch):

    giver   Offer    rank, step, how many bytes of index and of body; of a copy, its lineage too
    taker   Ready    once there is room for the body
    giver            the index, then the body; no frames
    taker   Done     all of it is here, verified, and a copy is held

Who has a shard of which some bytes are bad says `Pick` for those, and hears `Piece` and the bytes:
that they are good is for the taker to see. Who takes a copy that came damaged says it in place of
`Done`, as often as it needs to: the giver has not let go of the shard yet.

Before that a server says `Challenge` (greeting.py). Instead of what is expected, `Failed` may come:
its sender hangs up after that. Only who finds damaged what it asked for says `Failed` and listens:
the giver looks at its own then, and says `Done` if that is intact, or `Failed`.
"""

from __future__ import annotations

import struct
from typing import Annotated, TypeVar

import msgspec

from orchestrator.agent.shards import ERRORS, KeeperError, Lineage, MalformedError, UnreachableError
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step

FRAME_BYTES_MAX = 4096
PICK_BYTES_MAX = 4 << 20
"""Of a shard, sent at a time: it is held in memory, and the loop copies it."""
LENGTH = struct.Struct("<I")
UNNAMED = NodeId("")
NONCE_BYTES = PROOF_BYTES = 32
_REASON_BYTES_MAX = 2000
_BY_NAME = {error.__name__: error for error in ERRORS}
_Natural = msgspec.Meta(ge=0, le=1 << 62)
_Size = msgspec.Meta(ge=1, le=1 << 62)
_Drawn = msgspec.Meta(min_length=NONCE_BYTES, max_length=NONCE_BYTES)
_Proof = msgspec.Meta(min_length=PROOF_BYTES, max_length=PROOF_BYTES)


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Anything that is said in a frame."""


class Challenge(Message, frozen=True):
    """Show me that you know the token, as I do; `nonce` was drawn for this connection."""

    nonce: Annotated[bytes, _Drawn]
    proof: Annotated[bytes, _Proof]


class Ask(Message, frozen=True):
    """Offer me this shard, if it was staged by `epoch`, or by whichever generation (None)."""

    rank: Annotated[Rank, _Natural]
    step: Annotated[Step, _Natural]
    epoch: Annotated[Generation, _Natural] | None = None


class Pick(Message, frozen=True):
    """Send me these bytes of a shard's body, from `start` on; `Piece`, then they come."""

    rank: Annotated[Rank, _Natural]
    step: Annotated[Step, _Natural]
    start: Annotated[int, _Natural]
    size: Annotated[int, msgspec.Meta(ge=1, le=PICK_BYTES_MAX)]


class Piece(Message, frozen=True):
    """Here they are."""


class Offer(Message, frozen=True, kw_only=True):
    """Here is this shard; `lineage` is what the sender of a copy knows, None if it was asked."""

    rank: Annotated[Rank, _Natural]
    step: Annotated[Step, _Natural]
    index_bytes: Annotated[int, _Size]
    body_bytes: Annotated[int, _Size]
    lineage: Lineage | None = None
    sender: NodeId = UNNAMED
    """Of a copy: the node that it comes from; "" if that does not know its own name yet."""


class Ready(Message, frozen=True):
    """There is room: send."""


class Done(Message, frozen=True):
    """It is here."""


class Failed(Message, frozen=True):
    """It is not, for this reason; `kind` is the name of a class of KeeperError."""

    kind: str
    reason: str


M = TypeVar("M", bound=Message)
_DECODER = msgspec.msgpack.Decoder(Challenge | Ask | Pick | Piece | Offer | Ready | Done | Failed)


def frame(message: Message) -> bytes:
    """Return a message as it is sent."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def length_of(head: bytes) -> int:
    """Return how many bytes follow the first four of a frame. Raises MalformedError if too many."""
    length: int = LENGTH.unpack(head)[0]
    if length > FRAME_BYTES_MAX:
        raise MalformedError(f"frame has {length} bytes, may have {FRAME_BYTES_MAX}")
    return length


def heard(body: bytes, speaker: str, kinds: tuple[type[M], ...]) -> M:
    """Return the message of a frame, which must be of one of the kinds.

    Raises:
        MalformedError: if it does not decode, or is another.
        KeeperError: if it is `Failed`: of the class that was told.
    """
    try:
        message = _DECODER.decode(body)
    except msgspec.MsgspecError as error:
        raise MalformedError(f"frame does not decode: {error}") from error
    if isinstance(message, Failed):
        raise _BY_NAME.get(message.kind, KeeperError)(f"{speaker}: {message.reason}")
    if not isinstance(message, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise MalformedError(f"{speaker} said {message}, expected {expected}")
    return message


def failed(error: KeeperError) -> Failed:
    """Return what tells another agent of an error, its message cut to what a frame has room for."""
    reason = str(error).encode()[:_REASON_BYTES_MAX].decode(errors="ignore")
    return Failed(type(error).__name__, reason)


def cut_off() -> UnreachableError:
    """Return what a node says whose fault plan cuts it off, to others and to itself."""
    return UnreachableError("this node is cut off by a fault plan")
