"""What lies in which file of a node's shared memory, and what of it may go.

Two rules. A file that somebody reads from is pinned: it is neither removed nor written over, though
it may be dropped, and then nobody else finds it. And of an abandoned lineage nothing is found: what
another generation staged than those that the current one continues, or staged after it was left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec

from orchestrator.protocol.ids import Generation, Rank, Step
from orchestrator.protocol.messages import Ancestor, Holding
from orchestrator.worker.slot import slot_file

SLOTS = 3
"""Staging slots of a rank: one that is restored from, one on its way to a buddy, one to write."""


class KeeperError(Exception):
    """A shard could not be kept, copied or brought here.

    Attributes:
        hint: what a person can do.
    """

    hint = "See the log of the node's agent."


class MalformedError(KeeperError):
    """What came is not a shard as it was announced."""

    hint = "All agents of a run must run the same version of holdfast."


class NotHeldError(KeeperError):
    """This memory has no such shard."""

    hint = "It was dropped, or its agent was started anew; an older state may be held."


class StaleError(KeeperError):
    """The shard is of a generation, or of a step, that is over."""

    hint = "None needed: its sender has not heard of a newer generation yet."


class CorruptError(KeeperError):
    """The bytes are not those that were staged; names the first bad chunk."""

    hint = "If it comes back on this node, suspect its memory."


class UnreachableError(KeeperError):
    """The other agent did not answer, or not in time."""

    hint = "If the other node is well, look at the network between the two."


class NoRoomError(KeeperError):
    """Shared memory is too full for the shard."""

    hint = "Give the node more memory, or its ranks smaller shards."


ERRORS: tuple[type[KeeperError], ...] = (
    MalformedError,
    NotHeldError,
    StaleError,
    CorruptError,
    UnreachableError,
    NoRoomError,
)


class _Head(msgspec.Struct, frozen=True):
    step: int
    epoch: int
    size: int


# As in storage/shard.py: made before there are threads.
_read = msgspec.json.Decoder(_Head).decode


@dataclass(slots=True, eq=False)
class Shard:
    """A shard in this node's memory: `size` bytes of the file at `path`, and what vouches for them.

    Attributes:
        generation: the one that staged it.
        index: the shard index as JSON text.
        slot: number of the staging slot it lies in; None if the file is the agent's own.
        pins: how many are reading from the file.
        dropped: not found any more; gone once the last pin is.
        renewed: came in place of another of the same rank and step, which may have been no good.
        staged_as: who staged it, if it was brought here as what another replica's rank staged.
    """

    rank: Rank
    step: Step
    generation: Generation
    size: int
    index: str
    path: Path
    slot: int | None = None
    pins: int = 0
    dropped: bool = False
    renewed: bool = False
    staged_as: Rank | None = None

    @classmethod
    def of(cls, rank: Rank, index: str, path: Path, slot: int | None = None) -> Shard:
        """Return the shard that an index describes, without a look at its chunks.

        Raises:
            MalformedError: if it is not an index.
        """
        try:
            head = _read(index)
        except msgspec.MsgspecError as error:
            raise MalformedError(f"rank {rank}: index does not decode: {error}") from error
        return cls(rank, Step(head.step), Generation(head.epoch), head.size, index, path, slot)

    def __str__(self) -> str:
        return f"shard of rank {self.rank}, step {self.step}"


class Named(Protocol):
    """What says of which state something is a part."""

    @property
    def step(self) -> Step:
        """Steps after which it was staged."""
        ...

    @property
    def generation(self) -> Generation:
        """Who staged it."""
        ...


@dataclass(frozen=True, slots=True)
class Lineage:
    """Which states count: those of `generation`, and those that it continues.

    Attributes:
        restore: step from which it continues; None for the seed.
        retained: step before which nothing is needed any more.
        ancestors: which older generations it continues, and up to which step of each; None if
            that is not known: then every older one counts, up to step `restore`.
    """

    generation: Generation = Generation(0)
    restore: Step | None = None
    retained: Step = Step(-1)
    ancestors: tuple[Ancestor, ...] | None = None

    def __str__(self) -> str:
        start = "the seed" if self.restore is None else f"step {self.restore}"
        return f"generation {self.generation} from {start}, retaining step {self.retained} and up"

    def has(self, shard: Named) -> bool:
        """Whether a generation that starts now, or this one, could continue from the shard."""
        if shard.step < self.retained:
            return False
        if shard.generation >= self.generation:
            return True
        if self.restore is None or shard.step > self.restore:
            return False
        return self.ancestors is None or any(
            shard.generation == one.generation and shard.step <= one.last for one in self.ancestors
        )


class Shelf:
    """The shards of one node. Not a coroutine in it: each call is one step for everybody else.

    Attributes:
        lineage: which states count.
    """

    def __init__(
        self,
        memory: Path,
        *,
        on_freed: Callable[[Rank, int], None],
        remove: Callable[[Path], None],
    ) -> None:
        """Begin with nothing.

        Args:
            memory: folder of the staging slots.
            on_freed: called when a slot may be written again.
            remove: called with a file that is of no use any more.
        """
        self.lineage = Lineage()
        self._memory = memory
        self._on_freed = on_freed
        self._remove = remove
        self._seated: frozenset[Rank] | None = None
        """Ranks whose slots may be written to; None for any."""
        self._by_file: dict[Path, Shard] = {}
        """Every file in use; of dropped shards those that are pinned."""
        self._sources: dict[Rank, Shard] = {}
        """What ranks were told to restore from, pinned."""

    def slot_file(self, rank: Rank, slot: int) -> Path:
        """Return the file of a staging slot."""
        return slot_file(self._memory, rank, slot)

    def find(self, rank: Rank, step: Step) -> Shard | None:
        """Return the shard that a rank staged after `step` steps; None if it is not held."""
        for shard in self._by_file.values():
            if (shard.rank, shard.step) == (rank, step) and not shard.dropped:
                return shard
        return None

    def require(self, rank: Rank, step: Step, epoch: Generation | None = None) -> Shard:
        """Return what `find` returns, if a certain generation staged it, or whichever (None).

        Raises:
            NotHeldError: if there is no such shard.
        """
        shard = self.find(rank, step)
        if shard is None or epoch not in (None, shard.generation):
            found = "is not" if shard is None else f"is of epoch {shard.generation}"
            wanted = "" if epoch is None else f", epoch {epoch}"
            raise NotHeldError(
                f"shard of rank {rank}, step {step}{wanted} {found} in this node's memory"
            )
        return shard

    def holdings(self) -> tuple[Holding, ...]:
        """Return what is held, by rank and step."""
        held = {(s.rank, s.step) for s in self._by_file.values() if not s.dropped}
        return tuple(Holding(rank, step) for rank, step in sorted(held))

    def renewed(self) -> tuple[Holding, ...]:
        """Return those of them that came in place of another."""
        held = {(s.rank, s.step) for s in self._by_file.values() if s.renewed and not s.dropped}
        return tuple(Holding(rank, step) for rank, step in sorted(held))

    def free_slots(self, rank: Rank) -> tuple[int, ...]:
        """Return the slots of a rank that hold nothing, ascending."""
        files = ((slot, self.slot_file(rank, slot)) for slot in range(SLOTS))
        return tuple(slot for slot, file in files if file not in self._by_file)

    def put(self, shard: Shard) -> None:
        """Have a shard found from now on, in place of any other of its rank and step.

        What was in the same file before has been written over and is not found any more. A rank
        that stages has restored, so what it restored from is let go.

        Raises:
            StaleError: if the lineage does not have it; a file that is the agent's own is removed.
        """
        if shard.slot is not None:
            self._let_go(shard.rank)
        if not self.lineage.has(shard):
            if shard.slot is None:
                self._remove(shard.path)
            raise StaleError(
                f"{shard} is of generation {shard.generation}, this node is at {self.lineage}"
            )
        overwritten = self._by_file.get(shard.path)
        if overwritten is not None:
            overwritten.dropped = True
        twin = self.find(shard.rank, shard.step)
        self._by_file[shard.path] = shard
        if twin is not None:
            shard.renewed = True
            self.drop(twin)

    def drop(self, shard: Shard, *, announce: bool = True) -> None:
        """Have a shard not found any more; its file goes, or its slot is freed, with its pins."""
        shard.dropped = True
        # A file that was written over belongs to a newer shard by now.
        if shard.pins or self._by_file.get(shard.path) is not shard:
            return
        del self._by_file[shard.path]
        if shard.slot is None or not self._has_seat(shard.rank):
            self._remove(shard.path)
        elif announce:
            self._on_freed(shard.rank, shard.slot)

    def seat(self, ranks: Iterable[Rank]) -> None:
        """Know which ranks may write to their slots. Files of others' slots go when dropped."""
        self._seated = frozenset(ranks)

    def spare(self, files: Mapping[Path, Rank]) -> list[Path]:
        """Return those of the slot files that hold nothing and belong to a rank without a seat."""
        return [
            path
            for path, rank in files.items()
            if path not in self._by_file and not self._has_seat(rank)
        ]

    def begin(
        self,
        generation: Generation,
        restore: Step | None,
        ancestors: tuple[Ancestor, ...] | None = None,
    ) -> None:
        """Drop what a generation that continues from step `restore` (None: the seed) abandons.

        Slots that this frees are not announced: the seats of the new generation name them. News
        that is not newer than what is known changes nothing.
        """
        if generation <= self.lineage.generation:
            return
        for rank in tuple(self._sources):
            self._let_go(rank, announce=False)
        back_to = Step(-1) if restore is None else restore
        self.lineage = Lineage(generation, restore, min(self.lineage.retained, back_to), ancestors)
        self._drop_outside(announce=False)

    def retain(self, step: Step) -> None:
        """Drop what is older than `step`; frees slots, and says so."""
        self.lineage = replace(self.lineage, retained=max(step, self.lineage.retained))
        self._drop_outside()

    def evict(self, rank: Rank) -> bool:
        """Drop the oldest step of a rank without a free slot; return whether there was one.

        Never the retained step, which is what a recovery would start from, nor the newest, nor
        one that is being read.
        """
        if self.free_slots(rank):
            return False
        own = sorted(
            (s for s in self._by_file.values() if s.rank == rank and s.slot is not None),
            key=lambda shard: shard.step,
        )
        for shard in own[:-1]:
            if shard.step > self.lineage.retained and not shard.pins and not shard.dropped:
                self.drop(shard)
                return True
        return False

    @contextlib.contextmanager
    def pinned(self, shard: Shard) -> Iterator[Shard]:
        """Keep a shard's file as it is while the block runs."""
        self.pin(shard)
        try:
            yield shard
        finally:
            self.unpin(shard)

    def pin(self, shard: Shard) -> None:
        """Keep a shard's file as it is until `unpin`."""
        shard.pins += 1

    def unpin(self, shard: Shard, *, announce: bool = True) -> None:
        """Let go; if the shard was dropped meanwhile, its file goes or its slot is freed now."""
        shard.pins -= 1
        if shard.dropped:
            self.drop(shard, announce=announce)

    def lend(self, shard: Shard) -> None:
        """Pin what its rank will restore from, until that rank stages or a generation begins."""
        self._let_go(shard.rank)
        self.pin(shard)
        self._sources[shard.rank] = shard

    def _has_seat(self, rank: Rank) -> bool:
        return self._seated is None or rank in self._seated

    def _let_go(self, rank: Rank, *, announce: bool = True) -> None:
        source = self._sources.pop(rank, None)
        if source is not None:
            self.unpin(source, announce=announce)

    def _drop_outside(self, *, announce: bool = True) -> None:
        """Drop what the lineage does not have."""
        for shard in [s for s in self._by_file.values() if not self.lineage.has(s)]:
            self.drop(shard, announce=announce)
