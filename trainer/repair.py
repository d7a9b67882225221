"""Brings a rank whose state has gone bad back to what its twins hold, and has the step begun anew.

Twins hold the same shard in different replicas. When digests of a step differ, the step has not
moved anything yet, so nothing of it counts so far; but steps before it do. Copying what most twins
hold is therefore right only if no step that counts has used what is wrong: if all of the state was
seen to be alike in the step before, or the run has only just begun. Of a state that is looked at a
part at a time, what differs may have differed for a whole round, and what came of it is in the
gradients of all ranks: then the run has to go back, and so it does whenever nobody can be named, or
it happens to the same rank again. docs/adr/0017 has more of it.

What was wrong with the gradient, or only with a digest, is gone when the step is begun anew. But
what digests may be wrong itself: if ranks one after the other have other digests of the same bits,
no rank goes by digests any more, rather than that each of them is repaired in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from trainer import parallel
from trainer.digest import digest
from trainer.guard import Guard
from trainer.hold import Digests, differ
from trainer.optim import Optimizer
from trainer.watch import Held

VOTERS_MIN = 3
"""With fewer there is no majority that means anything; as where the controller compares."""
AGAIN_STEPS = 1000
"""A rank whose state goes bad again within so many steps is not repaired again: its device is
broken, and every repair is a race. As many clear a device that is on probation."""
PIECE = 1 << 20
"""Numbers that are copied at once: so many are in memory twice meanwhile, however large a weight
is."""
MISTAKEN_MAX = 2
"""Ranks whose digests differed while their state did not: of more of them within `AGAIN_STEPS`, it
is what digests that is broken."""
TELLERS = 2
"""Ranks that report what all know; if one of them is lost, the other has said it."""
ALIKE, OUTVOTED, SEVERAL, UNDECIDED = range(4)
"""What the twins of a shard come to."""
_HOW = {
    SEVERAL: "more than one rank of a shard differs from most, which is no single fault",
    UNDECIDED: f"fewer than {VOTERS_MIN} ranks hold it, or no majority of them holds the same",
}
Row: TypeAlias = Sequence[float]


class Told(Protocol):
    """Who hears of it; `trainer.reporter.Reporter`."""

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Hear that a rank's state was wrong, and now is that of another one."""

    def repairing(self, step: int, *, rank: int, source: int, tensors: Sequence[str]) -> None:
        """Hear that a rank's state was wrong, and is about to be given that of another one."""

    def not_repaired(self, step: int, *, because: str) -> None:
        """Hear that state differs, and why it stays so."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""


class Stepping(Protocol):
    """Whose state it is; `trainer.step.Training`."""

    world: parallel.World
    optimizer: Optimizer

    def state(self) -> list[Held]:
        """Return this rank's part of the state."""

    def before_write(self) -> None:
        """Have whoever copies the state be done with it."""


class Vote(NamedTuple):
    """What twins come to who compared what they hold, or what they digested of it."""

    outcome: int = ALIKE
    outvoted: int = 0
    """Which of them has something else than all others, if one has: its replica."""
    source: int = 0
    """The first of the others."""
    things: int = 0
    """Of how many things."""
    pieces: int = 0
    """In how many they are copied."""


def vote(rows: Sequence[Row]) -> tuple[Vote, tuple[int, ...]]:
    """Return what follows from what twins say of the same things, and which of these differ.

    >>> vote([[1, 5], [1, 5], [1, 6]])
    (Vote(outcome=1, outvoted=2, source=0, things=1, pieces=0), (1,))
    """
    guilty: set[int] = set()
    places: list[int] = []
    for place, values in enumerate(zip(*rows, strict=True)):
        if len(set(values)) == 1:
            continue
        right = max(sorted(set(values)), key=values.count)
        if len(values) < VOTERS_MIN or 2 * values.count(right) <= len(values):
            return Vote(UNDECIDED), ()
        guilty.update(twin for twin, value in enumerate(values) if value != right)
        places.append(place)
    if len(guilty) > 1:
        return Vote(SEVERAL), ()
    if not guilty:
        return Vote(), ()
    (outvoted,) = guilty
    return Vote(OUTVOTED, outvoted, int(outvoted == 0), len(places)), tuple(places)


class _Looked(NamedTuple):
    """What twins came to who compared all of their state."""

    votes: list[Vote]
    """Of each shard."""
    places: tuple[int, ...]
    """What differs in this rank's shard, in the order of names."""
    given_the_same: bool
    """Whether a rank says that it was given what it had already."""


class Repairs:
    """Those of one rank.

    Args:
        training: whose state.
        period: says in how many steps up to one all of it was looked at.
        of_state: so many of the numbers that a rank says of a step are about state; those behind
            them are about its gradient.
        digests: guards what ranks say of a step.
    """

    def __init__(
        self, training: Stepping, period: Callable[[int], int], of_state: int, digests: Guard
    ) -> None:
        self._training, self._period, self._of_state = training, period, of_state
        self._guard, self._digests_guard = Guard("repairs"), digests
        layout = training.world.layout
        self._shards, self._count = layout.shards().tolist(), layout.shard_count
        self._sound: int | None = None
        """No step up to this one has used state that was not alike; None before the first."""
        self._last: dict[int, int] = {}
        """In which step each rank was repaired last."""
        self._mistaken: dict[int, int] = {}
        """In which step each rank had other digests of the same state last."""
        self._over = False
        self._begun = 0.0

    def forget(self) -> None:
        """Begin as after a restore: the state is another one than a moment ago."""
        self._sound, self._last, self._mistaken, self._over = None, {}, {}, False

    def begin(self, step: int) -> None:
        """Hear that a step begins."""
        self._begun = time.monotonic()
        if self._sound is None:
            # From memory, each rank starts with what it staged itself: what differs there may have
            # been used by steps before. Only what a run begins with is the same for certain.
            self._sound = 0 if step == 1 else -1

    def differ(self, step: int, told: Digests, reporter: Told) -> bool:
        """Compare what ranks digested; return whether the step is to be begun anew.

        Args:
            step: its number; it has moved nothing yet.
            told: of each rank, what it digested, None of one that digests nothing; alike
                everywhere, so that all do the same.
            reporter: hears of it.
        """
        rows = [row for row in told if row is not None]
        if not differ(self._shards, told):
            if self._period(step) == 1 and len(rows) == len(told):
                self._sound = step
            return False
        if len(rows) < len(told):
            return self._refuse(step, "not all ranks digest what they hold any more", reporter)
        anew = self._settle(step, rows, reporter)
        self._guard.tell(reporter)
        return anew

    def state_differs(self, step: int, reporter: Told) -> bool:
        """Compare all of the state now; return whether the step is to be begun anew.

        For whoever found that ranks do not compute the same: they may not have computed from the
        same.
        """
        anew = self._settle(step, None, reporter)
        self._guard.tell(reporter)
        return anew

    def _settle(self, step: int, told: Sequence[Row] | None, reporter: Told) -> bool:
        """Look at all of the state, and repair what differs, if that is right."""
        if self._over:
            return False
        looked = self._look()
        if looked is None:
            return self._refuse(step, "not all ranks can digest all of their state", reporter)
        votes, places, _ = looked
        right = self._sound is not None and self._sound >= step - 1
        copies = any(each.outcome != ALIKE for each in votes)
        mistaken = False
        if not copies:
            if told is None:
                return False
            # What differed is no state, or none that lasts.
            votes, mistaken = self._of_told(told)
            right |= not mistaken
        shard, why = self._objection(step, votes, right=right)
        if why:
            return self._refuse(step, why, reporter)
        return self._mend(step, shard, votes[shard], places if copies else None, mistaken, reporter)

    def _mend(
        self,
        step: int,
        shard: int,
        found: Vote,
        places: Sequence[int] | None,
        mistaken: bool,  # noqa: FBT001 - as above
        reporter: Told,
    ) -> bool:
        """Give one twin what another holds, and say so; return whether the step begins anew.

        Args:
            step: which has moved nothing yet.
            shard: in which one differs.
            found: what its twins came to.
            places: what of it is copied; None if nothing differs.
            mistaken: whether a rank said then that its state differs.
            reporter: hears of it.
        """
        rank, source = self._who(shard, found)
        names = [self._names()[place] for place in places or ()]
        holders = [each for each, held in enumerate(self._shards) if held == shard]
        tells = self._training.world.rank in [each for each in holders if each != rank][:TELLERS]
        if places is not None:
            if tells:
                # Who dies of what comes now leaves this behind.
                reporter.repairing(step, rank=rank, source=source, tensors=names)
            holds, mistaken = self._copy(step, shard, found, places)
            if not holds and not mistaken:
                why = f"rank {rank} does not hold what it was given by rank {source}"
                return self._refuse(step, why, reporter)
        self._last[rank] = step
        if tells:
            reporter.repaired(
                step,
                rank=rank,
                source=source,
                tensors=[] if mistaken else names,
                seconds=time.monotonic() - self._begun,
            )
        if mistaken:
            self._mistake(step, rank)
        return True

    def _who(self, shard: int, found: Vote) -> tuple[int, int]:
        """Return who is outvoted in a shard, and who has what most have."""
        layout = self._training.world.layout
        return layout.rank_of(shard, found.outvoted), layout.rank_of(shard, found.source)

    def _of_told(self, told: Sequence[Row]) -> tuple[list[Vote], bool]:
        """Return what ranks come to by what they said of a step; whether that was of their state.

        Nothing of that differs now: they were mistaken, then.
        """
        said = [vote(told[shard :: self._count]) for shard in range(self._count)]
        of_state = any(place < self._of_state for _, found in said for place in found)
        return [each for each, _ in said], of_state

    def _mistake(self, step: int, rank: int) -> None:
        """Enter that a rank had other digests of the same state; give digests up if many had."""
        self._mistaken[rank] = step
        lately = [each for each, at in self._mistaken.items() if step - at <= AGAIN_STEPS]
        if len(lately) > MISTAKEN_MAX:
            self._over = True
            who = ", ".join(map(str, sorted(lately)))
            self._digests_guard.give_up(
                f"ranks {who} had other digests of the same state than their twins, one after the "
                "other: it is what digests that is wrong, and nobody is repaired or compared",
                tells=self._training.world.rank < TELLERS,
            )

    def _objection(self, step: int, votes: Sequence[Vote], *, right: bool) -> tuple[int, str]:
        """Return in which shard a rank differs, and why it is not to be repaired; "" if it is."""
        differing = [shard for shard, each in enumerate(votes) if each.outcome != ALIKE]
        shard = differing[0]
        unclear = [votes[each].outcome for each in differing if votes[each].outcome in _HOW]
        if unclear:
            return shard, _HOW[unclear[0]]
        if len(differing) > 1:
            return shard, _HOW[SEVERAL]
        rank = self._training.world.layout.rank_of(shard, votes[shard].outvoted)
        last = self._last.get(rank)
        if last is not None and step - last <= AGAIN_STEPS:
            return shard, f"rank {rank} was repaired in step {last} already"
        period = self._period(step)
        if not right and period > 1:
            return shard, (
                f"a part of the state is looked at in each step, all of it in {period}: what "
                "differs may have done so before, and is in the gradients of all ranks since"
            )
        if not right:
            return shard, "not all of the state was compared in the step before"
        return shard, ""

    def _look(self, *, given_the_same: bool = False) -> _Looked | None:
        """Have twins compare all of their state; return what that came to.

        Collective. None if somebody can not digest its own.

        Args:
            given_the_same: whether this rank was given what it had already, and tells so.
        """
        world = self._training.world
        nothing = torch.zeros(len(self._names()), dtype=torch.int64, device=world.device)
        own = self._guard.call(self._digests, nothing)
        rows = [torch.empty_like(own) for _ in range(world.twins.size())]
        world.wait(dist.all_gather(rows, own, group=world.twins, async_op=True))
        found, places = vote([row.tolist() for row in rows])
        tensors = self._tensors()
        pieces = sum(-(-tensors[place].numel() // PIECE) for place in places)
        told = (self._guard.off, given_the_same, *found._replace(pieces=pieces))
        said = world.gather(list(map(float, told)))
        if any(row[0] for row in said):
            return None
        votes = []
        for shard in range(self._count):
            each = {tuple(map(int, row[2:])) for row in said[shard :: self._count]}
            # Who counts votes otherwise than the others is a vote for nothing.
            votes.append(Vote(*each.pop()) if len(each) == 1 else Vote(UNDECIDED))
        return _Looked(votes, places, any(row[1] for row in said))

    @torch.no_grad()
    def _copy(self, step: int, shard: int, found: Vote, places: Sequence[int]) -> tuple[bool, bool]:
        """Give one twin what another holds, piece by piece.

        Return whether all of them hold the same then, and whether it was given what it had.

        Collective: ranks that hold something else exchange nothings, so that all of them were in as
        many collectives, which is how those are told apart that hang.
        """
        self._training.before_write()
        world = self._training.world
        mine = world.shard == shard
        taking = mine and world.replica == found.outvoted
        nothings = itertools.repeat(torch.zeros(1, device=world.device), found.pieces)
        tensors = self._tensors()
        pieces = itertools.chain.from_iterable(
            torch.split(tensors[place].detach().view(-1), PIECE) for place in places
        )
        same = taking
        for piece in pieces if mine else nothings:
            buffer = piece.clone()
            source = found.source
            world.wait(dist.broadcast(buffer, group=world.twins, group_src=source, async_op=True))
            if taking:
                same = same and torch.equal(piece.view(torch.uint8), buffer.view(torch.uint8))
                piece.copy_(buffer)
        if taking:
            # How many steps lie behind it is a number that may be what went wrong.
            self._training.optimizer.set_steps(step - 1)
        looked = self._look(given_the_same=same)
        if looked is None:
            return False, False
        return all(each.outcome == ALIKE for each in looked.votes), looked.given_the_same

    def _tensors(self) -> list[Tensor]:
        return [tensor for each in self._training.state() for _, tensor in each.tensors]

    def _digests(self) -> Tensor:
        return torch.stack(
            [
                digest(tensor, f"{each.kind}/{name}")
                for each in self._training.state()
                for name, tensor in each.tensors
            ]
        )

    def _names(self) -> list[str]:
        return [
            f"{each.kind} of {name}" for each in self._training.state() for name, _ in each.tensors
        ]

    def _refuse(self, step: int, why: str, reporter: Told) -> bool:
        """Say once why nothing is repaired any more, and leave it to others."""
        if not self._over and self._training.world.rank < TELLERS:
            reporter.not_repaired(step, because=why)
        self._over = True
        self._guard.tell(reporter)
        return False
