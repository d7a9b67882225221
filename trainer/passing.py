"""Passes the state that one rank has read on to its twins, the ranks that hold the same shard.

If each of them read, the store would give every byte as often as there are replicas, while the
network between them is idle. Who reads says in the world's own store when that is done, and only
then do they meet: a collective has a limit, and to read may take longer than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.digest import digest
from trainer.parallel import World

PIECE = 1 << 24
"""Numbers that are sent at once."""
ASK_AGAIN_S, ASK_AGAIN_MAX_S, SLOWER = 0.02, 2.0, 1.5
"""Whether it is read is asked again after this, each time so much later, at most."""


def reader(world: World) -> int:
    """Return the replica that reads this rank's shard: in turn, so that all nodes share in it."""
    return world.shard % world.layout.dp_replicate


def reads(world: World) -> bool:
    """Whether this rank reads, for its twins as well."""
    return world.replica == reader(world)


def announce(world: World) -> None:
    """Say that this rank has read its state."""
    world.store.set(_key(world), "")


def await_reader(world: World, alive: Callable[[], object]) -> None:
    """Wait until the rank that reads has said that it is done.

    Args:
        world: of this rank.
        alive: called now and then; raises if this rank is to leave, as when that one died.
    """
    pause_s = ASK_AGAIN_S
    while not world.store.check([_key(world)]):
        alive()
        time.sleep(pause_s)
        pause_s = min(pause_s * SLOWER, ASK_AGAIN_MAX_S)


def pass_on(world: World, tensors: Sequence[tuple[str, Tensor]]) -> bool:
    """Have twins hold what the one that reads holds; return whether this rank does.

    Collective.

    Args:
        world: of this rank.
        tensors: all of its state by name, the same ones on each twin.
    """
    source = reader(world)
    for _, tensor in tensors:
        for piece in torch.split(tensor.detach().view(-1), PIECE):
            if piece.numel():
                sent = dist.broadcast(piece, group=world.twins, group_src=source, async_op=True)
                world.wait(sent)
    own = torch.stack([digest(tensor, name) for name, tensor in tensors])
    rows = [torch.empty_like(own) for _ in range(world.twins.size())]
    world.wait(dist.all_gather(rows, own, group=world.twins, async_op=True))
    return torch.equal(own, rows[source])


def _key(world: World) -> str:
    return f"shard-{world.shard}-is-read"
