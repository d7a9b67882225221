"""What things take in a simulated cluster, each with where the number comes from."""

from __future__ import annotations

from typing import Literal

import msgspec

Origin = Literal["measured", "published", "assumed"]


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One number, seconds unless its name says otherwise."""

    value: float
    origin: Origin
    source: str
    """Command that measured it, publication that has it, or why it was assumed."""


class Profile(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Everything that takes time. Of a world, the slowest of its nodes counts."""

    name: str
    order: Constant
    """From a decision until every node has it."""
    exit: Constant
    """From the death of a process until the controller knows."""
    trouble: Constant
    """From a death until the collectives of the others fail."""
    stop: Constant
    """Ranks that live on leave their old world."""
    seat: Constant
    """A process that lives takes its seat."""
    warm: Constant
    """A warm process takes a seat for the first time."""
    rendezvous: Constant
    load: Constant
    """State that lies in a node's memory becomes that of its ranks."""
    fetch: Constant
    """A shard comes from another node's memory."""
    read: Constant
    """A shard comes from the durable tier."""
    first_step: Constant
    """What the first step of a generation takes beyond a step."""
    step: Constant
    stall: Constant
    """A save keeps training waiting."""
    copy: Constant
    """A staged shard reaches the buddy."""
    write: Constant
    """A staged shard becomes durable."""
    commit: Constant
    search: Constant
    reboot: Constant
    """An agent that died starts again, with warm processes."""
    gone: Constant
    """From the loss of an agent until its world says so; longer than silence, if it never does."""
