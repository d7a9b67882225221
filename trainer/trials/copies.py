"""A rank's state: remembered, sent through bytes of a checkpoint, fingerprinted."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from orchestrator.protocol.injections import Injection
from orchestrator.worker import Slot
from storage.filling import memory_reader
from storage.shard import plan
from trainer.checkpoint import Checkpointer
from trainer.stamp import Stamp
from trainer.step import Training
from trainer.trials.forms import spoil


class Snapshot(NamedTuple):
    """The state after some steps."""

    step: int
    tensors: list[Tensor]


def take(training: Training, step: int) -> Snapshot:
    """Remember the state after `step` steps."""
    return Snapshot(step, [tensor.clone() for tensor in _state(training)])


@torch.no_grad()
def put_back(training: Training, snapshot: Snapshot) -> None:
    """Bring a state back, to the bit."""
    for tensor, kept in zip(_state(training), snapshot.tensors, strict=True):
        tensor.copy_(kept)
    training.optimizer.set_steps(snapshot.step)


def fingerprint(tensors: list[Tensor]) -> str:
    """Return 64 bits of xxh3 over tensors as 16 hex digits.

    Of another kind than the digests that detectors use, so that who judges them does not share
    their mistakes.
    """
    hasher = xxhash.xxh3_64()
    for tensor in tensors:
        hasher.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def weights(training: Training) -> str:
    """Return the fingerprint of the weights."""
    return fingerprint([shard.param for shard in training.optimizer.shards])


def everything(training: Training) -> str:
    """Return the fingerprint of the state and of the gradient that led to it."""
    gradients = [s.param.grad for s in training.optimizer.shards if s.param.grad is not None]
    return fingerprint([*_state(training), *gradients])


class Desk:
    """Takes one staged shard, as an agent does, and hands it back."""

    persisting = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.buffer, self.index = memoryview(b""), ""

    def slot(self, size: int) -> Slot:
        """Return room for a shard."""
        slot = Slot(0, self._path, size)
        self.buffer = slot.buffer
        return slot

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        """Take it."""
        del slot, generation, step, durable
        self.index = index

    def give_back(self, slot: Slot) -> None:
        """Nobody waits here, so that nothing is given up."""

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        """Likewise."""

    def stalled(self, seconds: float) -> None:
        """Training waits for nobody here."""


def reload(
    training: Training, stamp: Stamp, step: int, room: Path, how: Injection | None = None
) -> bool:
    """Send the state through the bytes of a checkpoint and back, as a restart does.

    Args:
        training: whose.
        room: the file of a slot.
        stamp: what it belongs to.
        step: steps that it has.
        how: what goes wrong with the bytes, once they have digests or before.

    Returns:
        Whether a bit of them went wrong.

    Raises:
        ShardCorruptError: if bytes are not what has been staged; the state is worthless then.
    """
    checkpointer = Checkpointer(training.optimizer.shards, training.world, stamp)
    desk = Desk(room)
    changed = False
    if how is not None and how.site == "copied":
        # What is copied to the host is wrong, while what is on the device is not.
        kept = take(training, step)
        changed = _spoil_state(training, how)
        assert checkpointer.save(desk, step, durable=False)
        checkpointer.settle()
        put_back(training, kept)
    else:
        assert checkpointer.save(desk, step, durable=False)
        checkpointer.settle()
        if how is not None:
            changed = _spoil_bytes(checkpointer, desk, how)
    found = checkpointer.restore(desk.index, memory_reader(desk.buffer))
    training.optimizer.set_steps(found)
    return changed


def _spoil_state(training: Training, how: Injection) -> bool:
    tensors = _state(training)
    return spoil(tensors[int(how.place * len(tensors))], how)


def _spoil_bytes(checkpointer: Checkpointer, desk: Desk, how: Injection) -> bool:
    chunks = checkpointer.chunks
    name = chunks[int(how.place * len(chunks))].name
    piece = plan(chunks).views(desk.buffer)[name]
    return spoil(torch.frombuffer(piece, dtype=torch.uint8).view(torch.float32), how)


def _state(training: Training) -> list[Tensor]:
    return [tensor for shard in training.optimizer.shards for tensor in shard[2:]]
