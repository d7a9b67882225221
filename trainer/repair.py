"""Brings a rank whose state has gone bad back to what its twins hold, and has the step begun anew.

Twins hold the same shard in different replicas. When digests of a step differ, the step has not
moved anything yet, so nothing of it counts so far; but steps before it do. Copying what most twins
hold is therefore right only if no step that counts has used what is wrong: if all of the state was
seen to be alike in the step before, or the run has only just begun. Of a state that is looked at a
part at a time, what differs may have differed for a whole round, and what came of it is in the
gradients of all ranks: then the run has to go back, and so it does whenever nobody can be named, or
it happens to the same rank again. docs/adr/0017 has more of it.

What was wrong with the gradient, or only with a digest, is gone when the step is begun anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
    """Who hears of it; `trainer.step.Reporter`."""

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Hear that a rank's state was wrong, and now is that of another one."""

    def not_repaired(self, step: int, *, because: str) -> None:
        """Hear that state differs, and why it stays so."""


class Stepping(Protocol):
    """Whose state it is; `trainer.step.Training`."""

    world: parallel.World
    optimizer: Optimizer

    def state(self) -> list[Held]:
        """Return this rank's part of the state."""


class Vote(NamedTuple):
    """What twins come to who compared what they hold, or what they digested of it."""

    outcome: int = ALIKE
    outvoted: int = 0
    """Which of them has something else than all others, if one has: its replica."""
    source: int = 0
    """The first of the others."""
    things: int = 0
    """Of how many things."""


def vote(rows: Sequence[Row]) -> tuple[Vote, tuple[int, ...]]:
    """Return what follows from what twins say of the same things, and which of these differ.

    >>> vote([[1, 5], [1, 5], [1, 6]])
    (Vote(outcome=1, outvoted=2, source=0, things=1), (1,))
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


class Repairs:
    """Those of one rank.

    Args:
        training: whose state.
        period: in so many steps, all of it is looked at once.
        of_state: so many of the numbers that a rank says of a step are about state; those behind
            them are about its gradient.
    """

    def __init__(self, training: Stepping, period: int, of_state: int) -> None:
        self._training, self._period, self._of_state = training, period, of_state
        self._guard = Guard("repairs")
        layout = training.world.layout
        self._shards, self._count = layout.shards().tolist(), layout.shard_count
        self._sound: int | None = None
        """No step up to this one has used state that was not alike; None before the first."""
        self._last: dict[int, int] = {}
        """In which step each rank was repaired last."""
        self._over = False
        self._begun = 0.0

    def forget(self) -> None:
        """Begin as after a restore: the state is another one than a moment ago."""
        self._sound, self._last, self._over = None, {}, False

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
            if self._period == 1 and len(rows) == len(told):
                self._sound = step
            return False
        if len(rows) < len(told):
            return self._refuse(step, "not all ranks digest what they hold any more", reporter)
        return self._settle(step, rows, reporter)

    def state_differs(self, step: int, reporter: Told) -> bool:
        """Compare all of the state now; return whether the step is to be begun anew.

        For whoever found that ranks do not compute the same: they may not have computed from the
        same.
        """
        return self._settle(step, None, reporter)

    def _settle(self, step: int, told: Sequence[Row] | None, reporter: Told) -> bool:
        """Look at all of the state, and repair what differs, if that is right."""
        if self._over:
            return False
        looked = self._look()
        if looked is None:
            return self._refuse(step, "not all ranks can digest all of their state", reporter)
        votes, places = looked
        right = self._sound is not None and self._sound >= step - 1
        copies = any(each.outcome != ALIKE for each in votes)
        if not copies:
            if told is None:
                return False
            # What differed is no state, or none that lasts.
            said = [vote(told[shard :: self._count]) for shard in range(self._count)]
            votes = [each for each, _ in said]
            right |= all(place >= self._of_state for _, found in said for place in found)
        shard, why = self._objection(step, votes, right=right)
        if why:
            return self._refuse(step, why, reporter)
        rank, source = (
            self._training.world.layout.rank_of(shard, replica)
            for replica in (votes[shard].outvoted, votes[shard].source)
        )
        if copies and not self._copy(step, shard, votes[shard], places):
            why = f"rank {rank} does not hold what it was given by rank {source}"
            return self._refuse(step, why, reporter)
        self._last[rank] = step
        holders = [each for each, held in enumerate(self._shards) if held == shard]
        if self._training.world.rank in [each for each in holders if each != rank][:TELLERS]:
            reporter.repaired(
                step,
                rank=rank,
                source=source,
                tensors=[self._names()[place] for place in places] if copies else [],
                seconds=time.monotonic() - self._begun,
            )
        return True

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
        if not right and self._period > 1:
            return shard, (
                f"a part of the state is looked at in each step, all of it in {self._period}: what "
                "differs may have done so before, and is in the gradients of all ranks since"
            )
        if not right:
            return shard, "not all of the state was compared in the step before"
        return shard, ""

    def _look(self) -> tuple[list[Vote], tuple[int, ...]] | None:
        """Have twins compare all of their state; return what each shard's came to.

        Collective. And what differs in this rank's shard, as places in the order of names. None if
        somebody can not digest its own.
        """
        world = self._training.world
        nothing = torch.zeros(len(self._names()), dtype=torch.int64, device=world.device)
        own = self._guard.call(self._digests, nothing)
        rows = [torch.empty_like(own) for _ in range(world.twins.size())]
        world.wait(dist.all_gather(rows, own, group=world.twins, async_op=True))
        found, places = vote([row.tolist() for row in rows])
        said = world.gather([float(self._guard.off), *map(float, found)])
        if any(row[0] for row in said):
            return None
        votes = []
        for shard in range(self._count):
            each = {tuple(map(int, row[1:])) for row in said[shard :: self._count]}
            # Who counts votes otherwise than the others is a vote for nothing.
            votes.append(Vote(*each.pop()) if len(each) == 1 else Vote(UNDECIDED))
        return votes, places

    @torch.no_grad()
    def _copy(self, step: int, shard: int, found: Vote, places: Sequence[int]) -> bool:
        """Give one twin what another holds; return whether all of them hold the same then.

        Collective: ranks that hold something else exchange nothings, so that all of them were in as
        many collectives, which is how those are told apart that hang.
        """
        world = self._training.world
        mine = world.shard == shard
        tensors = [tensor for each in self._training.state() for _, tensor in each.tensors]
        for number in range(found.things):
            tensor = tensors[places[number]] if mine else torch.zeros(1, device=world.device)
            buffer = tensor.clone(memory_format=torch.contiguous_format)
            source = found.source
            world.wait(dist.broadcast(buffer, group=world.twins, group_src=source, async_op=True))
            if mine and world.replica == found.outvoted:
                tensor.copy_(buffer)
        if mine and world.replica == found.outvoted:
            # How many steps lie behind it is a number that may be what went wrong.
            self._training.optimizer.set_steps(step - 1)
        looked = self._look()
        return looked is not None and all(each.outcome == ALIKE for each in looked[0])

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
        return False
