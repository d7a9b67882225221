"""Saves this rank's shard without holding training up, and continues from one.

Saving has two halves: a copy of the state into a slot of shared memory, and its digests, after
which the agent has it. A thread makes both beside the next step (trainer/staging.py); training
waits, right before its next update, for what is not copied by then. No rank waits for another. A
rank claims its slot while the step before is still under way, so that all of them can say whether
they have one together with what they exchange in that step anyway, and then all save, or none; and
all to the durable tier, or none.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from enum import IntEnum
from functools import partial
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from orchestrator.worker import MisconfiguredError, SaveStuckError, Slot
from storage import filling, parallel, shard
from storage.blob import BlobStore
from storage.contents import Contents
from storage.digest import Lanes, combine, partial_digest
from trainer.landing import fill, fill_some
from trainer.optim import STATES, ShardState
from trainer.parallel import World
from trainer.staging import Copying, GivenUpError, bytes_of
from trainer.stamp import Stamp, require_same
from trainer.tensor import cut_dimension

CUT_HINT = (
    "its commit record does not say how it is cut, or whoever asks does not cut anew, as in a "
    "bisection; a new run of another name can go on from it in any cut: spec.trainer.continueFrom"
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Keeper(Protocol):
    """Who takes staged shards; `orchestrator.worker.Worker` does."""

    def slot(self, size: int) -> Slot | None:
        """Return a slot to write to, if one is free."""

    def staged(self, slot: Slot, *, generation: int, step: int, index: str, durable: bool) -> None:
        """Hand over a filled slot."""

    def give_back(self, slot: Slot) -> None:
        """Take back a slot of which nothing is needed, and to which nobody writes any more."""

    def abandoned(self, step: int, *, generation: int, reason: str) -> None:
        """Count a save that comes to nothing; training goes on."""

    def stalled(self, seconds: float) -> None:
        """Count seconds for which training waited."""

    @property
    def persisting(self) -> bool:
        """Whether a shard is still on its way to the durable tier."""


class Readiness(IntEnum):
    """How well a rank can save its state; of a world, the least ready rank counts."""

    NOT = 0
    """No slot is free, or the save before is still under way."""
    MEMORY = 1
    """In memory only: the durable tier is not done with an older step."""
    DURABLE = 2


class _Save(NamedTuple):
    """One whose copy was not waited for."""

    copying: Copying
    step: int
    begun: float


class Checkpointer:
    """This rank's shard: every weight's part and what the optimizer remembers of it.

    Args:
        shards: weights and their states.
        world: of the rank.
        stamp: what its checkpoints belong to.
        within_s: a save that is not copied so long after it was begun is given up.
    """

    def __init__(
        self, shards: list[ShardState], world: World, stamp: Stamp, *, within_s: float = 60.0
    ) -> None:
        self._shards, self._world, self._stamp = shards, world, stamp
        self._within_s = within_s
        self._plan = shard.plan(_chunk(s, state, world) for s in shards for state in STATES)
        self._thread: threading.Thread | None = None
        self._copying: Copying | None = None
        """What the thread is at."""
        self._unwaited: _Save | None = None
        """The newest whose copy nobody has waited for."""
        self._slot: Slot | None = None
        """Claimed, and not filled yet."""

    @property
    def chunks(self) -> tuple[shard.Chunk, ...]:
        """What this rank's shard consists of."""
        return self._plan.chunks

    def claim(self, keeper: Keeper) -> bool:
        """Claim a slot for the next save, unless that is done; it stays claimed until then.

        Returns:
            Whether a save would succeed now: not if no slot is free, or the save before is still
            under way.
        """
        if self._thread is not None and self._thread.is_alive():
            return False
        if self._slot is not None:
            return True
        begun = time.monotonic()
        self._slot = keeper.slot(self._plan.size)
        if self._slot is None:
            return False
        keeper.stalled(time.monotonic() - begun)
        return True

    def readiness(self, keeper: Keeper) -> Readiness:
        """Claim a slot for the next save; return how well that would succeed now."""
        if not self.claim(keeper):
            return Readiness.NOT
        return Readiness.MEMORY if keeper.persisting else Readiness.DURABLE

    def save(self, keeper: Keeper, step: int, *, durable: bool, overlap: bool = False) -> bool:
        """Copy the state after `step` steps, and have it digested and handed over in a thread.

        Args:
            keeper: who has a slot, and takes it once it is filled.
            step: steps that the state has.
            durable: whether it is meant for the durable tier, too.
            overlap: copy in the thread as well. Then nothing may write to the state before
                `await_copied` has returned.

        Returns:
            Whether it will be; see `claim`.
        """
        if not self.claim(keeper):
            return False
        begun = time.monotonic()
        slot, self._slot = self._slot, None
        assert slot is not None
        copying = Copying(self._plan, list(self._ordered()), slot.buffer)
        if not overlap:
            copying.whole()
        self._copying, self._unwaited = copying, _Save(copying, step, begun)
        # A daemon: a copy that is stuck keeps no process from ending.
        self._thread = threading.Thread(
            target=self._stage,
            args=(copying, keeper, slot, step, durable),
            name="holdfast-stage",
            daemon=True,
        )
        self._thread.start()
        keeper.stalled(time.monotonic() - begun)
        return True

    @property
    def copying(self) -> bool:
        """Whether there is a save whose copy was not waited for."""
        return self._unwaited is not None

    def await_copied(
        self, keeper: Keeper, alive: Callable[[int], object] = lambda _: None
    ) -> float:
        """Wait until the state may be written to, and count that as a stall; return the seconds.

        A copy that is stuck, or not made in time, is given up: that save is abandoned, and this
        rank has none of that step.

        Args:
            keeper: hears of it.
            alive: called now and then, with how many pieces of the copy have moved.

        Raises:
            BaseException: what the copy raised, if it came to nothing: the rank can not read its
                own state. Or what `alive` did.
        """
        save, self._unwaited = self._unwaited, None
        if save is None:
            return 0.0
        begun = time.monotonic()
        copied = save.copying.wait(save.begun + self._within_s, alive)
        seconds = time.monotonic() - begun
        keeper.stalled(seconds)
        if not copied:
            reason = (
                f"{save.copying.place} of {self._plan.size} bytes were copied after "
                f"{begun + seconds - save.begun:.1f} s, for {seconds:.1f} s of which the next "
                f"update had waited; expected all of them within {self._within_s:g} s"
            )
            keeper.abandoned(save.step, generation=self._stamp.generation, reason=reason)
        return seconds

    def settle(self) -> None:
        """Wait until the save under way is over; its slot is this process's until then.

        Raises:
            SaveStuckError: if nothing of it moves any more.
        """
        if self._thread is None or self._copying is None:
            return
        moved = -1
        while self._thread.is_alive():
            if self._copying.moved == moved:
                raise SaveStuckError(
                    f"a thread that saves is stuck at byte {self._copying.place} of "
                    f"{self._plan.size} for {self._within_s:g} s"
                )
            moved = self._copying.moved
            self._thread.join(self._within_s)

    def restore(self, index_text: str, read: filling.Read) -> int:
        """Fill the state from a shard, verifying what arrived in it, and return its steps.

        Args:
            index_text: the shard's index, as JSON.
            read: from its body.

        Raises:
            MisconfiguredError: if it is of another run, model, sharding or data set; the state is
                as it was.
            ShardCorruptError: if a byte is not what was staged; the state is worthless then.
        """
        self.settle()
        index = shard.decode_index(index_text.encode(), staged=True)
        self._require_ours(index)
        chunks = {chunk.name: chunk for chunk in index.chunks}
        # The largest first, so that no thread has one to read when all others are done.
        tensors = sorted(self.tensors(), key=lambda one: -one[1].nbytes)
        parallel.each(
            lambda one: fill(one[1], partial(filling.read_chunk, index, chunks[one[0]], read)),
            tensors,
            at_once=parallel.CORES,
        )
        # Not before: of damage to a chunk in the header's block, that chunk's digest says more.
        filling.require_header(index, read)
        return index.step

    def recut(
        self, store: BlobStore, held: Contents, alive: Callable[[int], object] = lambda _: None
    ) -> int:
        """Fill the state from a checkpoint of this run that is cut otherwise; return its steps.

        Args:
            store: that has it.
            held: what it holds.
            alive: called with the bytes of each block that was read; may raise.

        Raises:
            MisconfiguredError: if it is of another run, model or data set; the state is as it was.
            StorageError: if a byte is not what was staged, or there is no answer; the state is
                worthless then.
        """
        self.settle()
        index = any_index(held)
        self._stamp.require_run(index)
        todo = list(zip(self._plan.chunks, self._ordered(), strict=True))
        while todo:
            todo = fill_some(store, held, todo, alive)
        return index.step

    def lanes(self, step: int) -> Lanes:
        """Return this rank's part of the state digest; each element counts once over the world."""
        if self._world.replica != 0:
            return (0, 0)
        parts = [
            _digest(s, state, tensor, self._world)
            for s in self._shards
            if s.counts
            for state, tensor in zip(STATES, s[2:], strict=True)
        ]
        if self._world.rank == 0:
            cursor = msgspec.json.encode(self._stamp.cursor(step), order="deterministic")
            parts.append(partial_digest("cursor", np.frombuffer(cursor, np.uint8)))
        return combine(parts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of this rank's state with the names of their chunks."""
        for s in self._shards:
            for state, tensor in zip(STATES, s[2:], strict=True):
                yield f"{state}/{s.name}", tensor

    def _ordered(self) -> Iterator[Tensor]:
        """Yield them in the order of the plan's chunks."""
        tensors = dict(self.tensors())
        return (tensors[chunk.name] for chunk in self._plan.chunks)

    def _stage(
        self,
        copying: Copying,
        keeper: Keeper,
        slot: Slot,
        step: int,
        durable: bool,  # noqa: FBT001 - a thread's arguments
    ) -> None:
        stamp = self._stamp
        meta = shard.ShardMeta(
            run_id=stamp.run_id,
            model=stamp.model,
            step=step,
            epoch=stamp.generation,
            shard=self._world.shard,
            shards=self._world.shards,
            extra=msgspec.to_builtins(stamp.cursor(step)),
        )
        try:
            with copying.in_thread():
                sealed = shard.seal(self._plan, slot.buffer, meta, copying.fill)
        except GivenUpError:
            keeper.give_back(slot)
            return
        index = shard.encode_index(sealed).decode()
        keeper.staged(slot, generation=stamp.generation, step=step, index=index, durable=durable)

    def _require_ours(self, index: shard.ShardIndex) -> None:
        where = self._stamp.require_run(index)
        world = self._world
        for what, found, expected, hint in (
            ("shard", index.shard, world.shard, "it was handed to the wrong rank"),
            ("number of shards", index.shards, world.shards, CUT_HINT),
        ):
            require_same(what, found, expected, where, hint)
        if list(map(_box, index.chunks)) != list(map(_box, self._plan.chunks)):
            raise MisconfiguredError(
                f"checkpoint is cut otherwise than this run, into as many shards: {where}",
                hint=CUT_HINT,
            )


def any_index(held: Contents) -> shard.ShardIndex:
    """Return the index of some shard of a checkpoint; beside chunks, all say the same."""
    tensor = next(iter(held.tensors.values()))
    return next(iter(tensor.pieces.values()))[0].index


def _chunk(s: ShardState, state: str, world: World) -> shard.Chunk:
    return shard.Chunk(
        fqn=s.name,
        state=state,
        dtype=_DTYPES[s.param.dtype],
        shape=tuple(s.param.shape),
        global_shape=tuple(s.weight.shape),
        offset=_offset(s, world),
    )


def _box(chunk: shard.Chunk) -> tuple[object, ...]:
    return chunk.name, chunk.dtype, chunk.shape, chunk.global_shape, chunk.offset


def _offset(s: ShardState, world: World) -> tuple[int, ...]:
    """Return where this rank's part of a weight begins.

    Tensor parallelism cuts one dimension into equal parts, and fully_shard the rows of what a rank
    has of it, rounding up.
    """
    layout, at = world.layout, world.position
    offset, rows = [0] * s.weight.ndim, s.weight.shape[0]
    if (dimension := cut_dimension(s.weight)) is not None:
        size = s.weight.shape[dimension] // layout.tp
        offset[dimension] = at.tp * size
        rows = size if dimension == 0 else rows
    each = -(-rows // (layout.dp_shard * layout.cp))
    offset[0] += min(each * (at.dp_shard * layout.cp + at.cp), rows)
    return tuple(offset)


def _digest(s: ShardState, state: str, part: Tensor, world: World) -> Lanes:
    """Return what this rank's part of a weight, or of a state of it, adds to the state digest."""
    offset, shape = _offset(s, world), s.weight.shape
    start = sum(at * math.prod(shape[i + 1 :]) for i, at in enumerate(offset))
    words = np.frombuffer(bytes_of(part), _WORDS[part.element_size()])
    by_columns = cut_dimension(s.weight) not in (None, 0)
    return partial_digest(
        f"{state}/{s.name}",
        words.reshape(part.shape) if by_columns else words,
        start=start,
        row=math.prod(shape[1:]) if by_columns else None,
    )
