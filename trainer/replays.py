"""Ring replay within the steps of a training: when, with whom, and what becomes of a mismatch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor, nn

from orchestrator.protocol import runfile
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.ramp import Stage, at_stage
from orchestrator.worker import RankPhase
from trainer import parallel
from trainer.data import Batch, Batches
from trainer.guard import Guard
from trainer.optim import Optimizer
from trainer.pipeline import Micro
from trainer.reduction import Reduction
from trainer.replay import (
    Probe,
    Verdict,
    every,
    halves,
    joined,
    judge,
    known_good,
    mismatches,
    of_itself,
    tried,
)
from trainer.shares import Place, Share, share_of

RETRIES_MAX = 3
TELLERS = 2
"""Ranks that report; if one of them is lost, the other has said it."""


class Told(Protocol):
    """Who hears of it; `trainer.step.Reporter`."""

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Hear what the rank does from now on."""

    def diverged(
        self, step: int, *, since: int, ranks: Sequence[int], proven: bool, evidence: str
    ) -> None:
        """Hear that some ranks compute wrongly, or may do."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""


class Stepping(Protocol):
    """What is replayed; `trainer.step.Training`."""

    job: runfile.Trainer
    world: parallel.World
    stage: Stage
    stages: list[nn.Module]
    share: Share
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer
    reduction: Reduction | None
    warm: bool

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""

    def micro(self, batch: Batch) -> Micro:
        """Return this rank's part of some samples, on the device."""


class Replays:
    """Those of one rank.

    Args:
        training: whose steps they are of.
        samples: of all ranks.
        share: of the time of a step, that they may take.

    Attributes:
        again: whether the step is computed again: what was read ahead of it is used up.
    """

    @staticmethod
    def possible(layout: Layout, device: torch.device) -> bool:
        """Whether ranks compute micro-batches by themselves, and there is another to do it.

        And whether two processes get the same bits, which they were seen not to do on a GPU.
        """
        if device.type != "cpu":
            return False
        return layout.pp == layout.cp == layout.tp == 1 and layout.readers > 1

    def __init__(self, training: Stepping, samples: Batches, share: float) -> None:
        self._training, self.samples = training, samples
        self._every = every(share, training.share)
        self._guard = Guard("replays")
        self._probe = Probe(self._guard)
        self._due = self.again = self._stopped = False
        self._micro: Micro | None = None
        self._own = torch.zeros((), dtype=torch.int64)
        self._tries = 0
        self._verified: int | None = None
        """The last step whose state is known to be good, once it is known of one."""

    def forget(self) -> None:
        """Begin as after a restore: the state is another one than a moment ago."""
        self.again, self._tries, self._verified = False, 0, None

    def begin(self, step: int) -> None:
        """Begin to compute a step, or begin anew."""
        if self._verified is None:
            self._verified = known_good(step - 1, self._every)
        # Not in the first step of a process, which makes what gradients are looked at on.
        due = self._training.warm and step % self._every == 0
        self._due = due and not self._stopped

    def last_micro_batch(self) -> None:
        """Watch the gradient that comes next."""
        if self._due:
            self._probe.begin(self._training.stages[0])

    def own(self, loss: Tensor, micro: Micro) -> None:
        """Take note of this rank's last micro-batch, and of what it came to."""
        if self._due:
            self._own, self._micro = self._probe.end(loss), micro

    def differ(self, step: int, reporter: Told) -> bool:
        """Compute another rank's micro-batch; return whether the step is to be thrown away."""
        if not self._due:
            return False
        world = self._training.world
        # Another neighbour each time: two that err in the same way are not always paired.
        shift = 1 + step // self._every % (world.size - 1)
        replayed = self._replay(step, (world.rank + shift) % world.size)
        rows = self._exchange(self._own, replayed)
        pairs = [(row[0], row[1]) for row in rows]
        found = None if self._stopped else self._judged(step, pairs, shift)
        self._guard.tell(reporter)
        if found is None:
            self.again, self._tries = False, 0
            if not self._stopped:
                self._verified = max(step - 1, self._verified or 0)
            return False
        guilty = found.ranks if found.proven else ()
        tellers = [rank for rank in range(world.size) if rank not in guilty][:TELLERS]
        if world.rank in tellers and self._tries == 0:
            reporter.diverged(
                step - 1,
                since=self._verified or 0,
                ranks=found.ranks,
                proven=found.proven,
                evidence=f"in step {step}, {found.evidence}",
            )
        self.again, self._tries = True, self._tries + 1
        if self._tries > RETRIES_MAX:
            await_orders(reporter)
        return True

    def _judged(self, step: int, rows: list[tuple[int, int]], shift: int) -> Verdict | None:
        """Return what mismatches say; None if there are none, or no rank is to go on with this."""
        if not (edges := mismatches(rows, shift)):
            return None
        rank = self._training.world.rank
        twice = self._exchange(self._replay(step, rank), self._replay(step, rank))
        if not self._stopped and (reason := of_itself(twice)):
            # All ranks come to the same: they have the same digests.
            self._guard.give_up(reason)
            self._stopped = True
        if self._stopped:
            return None
        again = {
            of: [row[0] for row in self._exchange(self._replay(step, of))] for of in tried(edges)
        }
        if self._has_stopped():
            return None
        found = self._guard.call(lambda: judge(rows, shift, again.__getitem__), None)
        # It raises on every rank or on none: they have the same digests.
        self._stopped = self._guard.off
        return found

    def _replay(self, step: int, of: int) -> Tensor:
        """Return what the last micro-batch of a rank comes to here; learn nothing from it."""
        training, layout = self._training, self._training.world.layout
        at = layout.position(of)
        place = Place(at.dp_replicate, layout.dp_replicate, at.dp_shard, layout.dp_shard)
        indices = share_of(at_stage(training.job, training.stage), place).micro_batches[-1]
        # Without it, its own: other ranks wait for this one to take part in what follows.
        assert self._micro is not None
        micro = self._guard.call(
            lambda: training.micro(self.samples.batch(step, indices)), self._micro
        )
        (model,) = training.stages
        self._probe.begin(model)
        loss = training.loss(model(micro.inputs, micro.cuts), micro.targets)
        fixed = training.reduction is not None
        parallel.last_of_step(model, training.world, last=True, apart=fixed)
        torch.autograd.backward(loss / training.tokens)
        training.optimizer.take_gradients()
        return self._probe.end(loss.detach())

    def _has_stopped(self) -> bool:
        """Whether replays have been stopped by now: each exchange may do that."""
        return self._stopped

    def _exchange(self, *digests: Tensor) -> list[list[int]]:
        """Return the digests of all ranks; where one has none, all of them stop with replays."""
        own = halves(torch.stack(digests))
        rows = self._training.world.gather(torch.cat((own.new_tensor([self._guard.off]), own)))
        self._stopped = self._stopped or any(row[0] for row in rows)
        return [
            [joined(low, high) for low, high in zip(row[1::2], row[2::2], strict=True)]
            for row in rows
        ]


def await_orders(reporter: Told) -> NoReturn:
    """Wait to be told what becomes of a step that can not be got to come out the same.

    For as long as that takes: a controller gathers nodes for `spareWait`, and some for hours. Who
    stands still for too long is found by it, and a rank whose agent is gone is ended.

    Raises:
        Aborted: once the generation is over; by the reporter.
    """
    while True:
        reporter.phase(RankPhase.WAITING)
        time.sleep(0.05)
