"""Computes samples of other ranks once more, and finds out together with them who was wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from orchestrator.protocol import runfile
from orchestrator.protocol.ramp import Stage, at_stage
from orchestrator.worker import RankPhase
from trainer import parallel, processors, tensor
from trainer.aside import Aside, Asked
from trainer.blame import (
    VOTERS_MIN,
    Chain,
    Digests,
    Verdict,
    judge,
    mismatches,
    shown,
    tried,
)
from trainer.data import Batch, Batches, settings
from trainer.gradients import drop
from trainer.guard import Guard
from trainer.pipeline import Micro, Pipeline
from trainer.replay import halves, joined, known_good, of_itself
from trainer.shares import Place, Share, share_of
from trainer.tracing import Trace

T = TypeVar("T")
Looks: TypeAlias = Callable[[nn.Module, int], None]
Follows: TypeAlias = Callable[[nn.Module], contextlib.AbstractContextManager[None]]
RETRIES_MAX = 3
TELLERS = 2
"""Ranks that report what all know; if one of them is lost, the other has said it."""


class Told(Protocol):
    """Who hears of it; `trainer.reporter.Reporter`."""

    def phase(self, phase: RankPhase, *, micro_batch: int = 0) -> None:
        """Hear what the rank does from now on."""

    def diverged(
        self,
        step: int,
        *,
        since: int,
        ranks: Sequence[int],
        proven: bool,
        evidence: str,
        of_data: bool = False,
    ) -> None:
        """Hear that some ranks compute wrongly, or may do."""

    def looked_again(self, step: int, *, because: str) -> None:
        """Hear that a step stood out, and came out the same when it was computed once more."""

    def threw_away(self, step: int, *, because: str) -> None:
        """Hear that a step is computed again, and that nobody can be named for it."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""


class Stepping(Protocol):
    """What is replayed; `trainer.step.Training`."""

    job: runfile.Trainer
    world: parallel.World
    stage: Stage
    stages: list[nn.Module]
    pipeline: Pipeline | None
    share: Share
    loss: Callable[[Tensor, Tensor], Tensor]
    warm: bool

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""

    @property
    def adds_up_in_place(self) -> bool:
        """Whether the micro-batches of a step are added up in the gradients of the weights."""

    def micro(self, batch: Batch) -> Micro:
        """Return this rank's part of some samples, on the device."""


class Ring:
    """What one rank has to do with it. A replay changes no state, and gradients are dropped.

    Args:
        training: whose steps they are of.
        samples: of all ranks.

    Attributes:
        again: whether the step is computed again: what was read ahead of it is used up. So it
            is until the step is `done`, whoever finds nothing wrong in it meanwhile.
        aside: reads samples of other ranks.
        chain: how ranks follow from each other that compute a micro-batch.
        tried: whose micro-batches all ranks have computed once more, when some last differed.
    """

    def __init__(self, training: Stepping, samples: Batches) -> None:
        self._training, self.samples = training, samples
        self.aside, self._wait_s = Aside(), runfile.seconds(settings(training.job.data).wait_max)
        self.chain = Chain.of(training.world.layout, len(training.stages))
        self._place = self.chain.ranks.index(training.world.rank)
        self.tried: list[int] = []
        self.again = False
        self._tries, self._told = 0, False
        self._verified: int | None = None
        """The last step whose state is known to be good, once it is known of one."""
        # Where layers are gathered as they come, or cut, ranks meet within a pass.
        by_itself = training.world.shards == 1 and training.pipeline is None
        self._guards_passes = by_itself and all(map(parallel.recovers, training.stages))

    @property
    def tells(self) -> bool:
        """Whether this rank is one of those that report what all know."""
        return self._training.world.rank < TELLERS

    def forget(self) -> None:
        """Begin as after a restore: the state is another one than a moment ago."""
        self.again, self._tries, self._told, self._verified = False, 0, False, None

    def begin(self, step: int, longest: int) -> None:
        """Begin to compute a step; between two that are replayed are so many at most."""
        if self._verified is None:
            self._verified = known_good(step - 1, longest)

    def share(self, of: int) -> list[range]:
        """Return the micro-batches of a rank in the present step, as indices of its samples."""
        training, layout = self._training, self._training.world.layout
        at = layout.position(of)
        place = Place(at.dp_replicate, layout.dp_replicate, at.dp_shard, layout.dp_shard)
        return share_of(at_stage(training.job, training.stage), place).micro_batches

    def read(
        self, guard: Guard, step: int, indices: range, otherwise: Micro, reporter: Told
    ) -> Micro:
        """Return some samples; others if they can not be read: ranks wait for each other.

        Args:
            guard: of the detector that asks for it.
            step: whose samples they are.
            indices: which of them.
            otherwise: the others.
            reporter: hears that this rank waits for data, which is no hang.

        Raises:
            Aborted: by the reporter.
        """
        if guard.off:
            return otherwise
        asked = self.read_aside(lambda: self.samples.batch(step, indices), reporter)
        return guard.call(lambda: self._training.micro(asked.result()), otherwise)

    def read_aside(self, read: Callable[[], T], reporter: Told) -> Asked[T]:
        """Have something be read, and wait for it as long as for any samples; return it.

        Args:
            read: does it.
            reporter: hears that this rank waits for data, which is no hang.

        Raises:
            Aborted: by the reporter.
        """
        asked = self.aside.ask(read)
        asked.over(lambda: reporter.phase(RankPhase.DATA), self._wait_s)
        return asked

    def compute(
        self,
        guard: Guard,
        micros: Sequence[Micro],
        looks: Looks,
        reporter: Told,
        follows: Follows = lambda _: contextlib.nullcontext(),
    ) -> list[Tensor]:
        """Compute micro-batches once more; return their losses, or fewer if that raises.

        Args:
            guard: of the detector that asks for it.
            micros: in order.
            looks: is called before each backward pass with the model and the pass's number.
            reporter: hears of each, since it takes as long as one of the step.
            follows: returns a block of the model, in which it computes a micro-batch forward.

        Raises:
            Exception: whatever is wrong, where other ranks would wait for this one in vain.
        """
        losses: list[Tensor] = []
        try:
            for number, micro in enumerate(micros):
                reporter.phase(RankPhase.FORWARD, micro_batch=number)
                loss = self._guarded(guard, partial(self._pass, micro, number, looks, follows))
                if loss is None:
                    break
                losses.append(loss)
                if not self._training.adds_up_in_place:
                    drop(self._training.stages)
        finally:
            drop(self._training.stages)
        reporter.phase(RankPhase.OPTIMIZER)
        return losses

    def follow(self, micro: Micro, trace: Trace, reporter: Told) -> None:
        """Take a micro-batch through the pipeline once more, for the eyes of `trace` only.

        Collective: all ranks of a pipeline do so at once.

        Args:
            micro: this rank's part of it.
            trace: looks at it.
            reporter: as in `compute`.

        Raises:
            Exception: whatever is wrong: other ranks would wait for this one in vain.
        """
        training = self._training
        assert training.pipeline is not None

        def announce(phase: RankPhase, number: int) -> None:
            reporter.phase(phase, micro_batch=number)

        try:
            with tensor.losses(training.world.layout.tp):
                training.pipeline.replay(micro, training.tokens, announce, trace)
        finally:
            drop(training.stages)
        for stage in training.stages:
            parallel.let_go(stage)
        reporter.phase(RankPhase.OPTIMIZER)

    def _guarded(self, guard: Guard, computes: Callable[[], Tensor]) -> Tensor | None:
        if not self._guards_passes:
            return computes()
        loss = guard.call(computes, None)
        if loss is None:
            for stage in self._training.stages:
                parallel.recover(stage)
        return loss

    def _pass(self, micro: Micro, number: int, looks: Looks, follows: Follows) -> Tensor:
        training = self._training
        (model,) = training.stages
        with tensor.losses(training.world.layout.tp):
            with follows(model):
                loss = training.loss(model(micro.inputs, micro.cuts), micro.targets)
            looks(model, number)
            parallel.not_to_be_added_up(model, training.world)
            torch.autograd.backward(loss / training.tokens)
        return loss.detach()

    def compare(
        self, guard: Guard, own: Tensor, compute: Callable[[int], Tensor], shift: int
    ) -> Verdict | None:
        """Compare what ranks came to; return who was wrong, None if nobody can be said to be.

        Collective. Afterwards the guard has stopped if it is for nothing.

        Args:
            guard: of the detector that asks for it.
            own: digests of what this rank came to; int64, as many on each.
            compute: returns the same of any rank's, computed here.
            shift: each rank computes that of the one so many places further on, as one of a group
                that works on it together: a multiple of the size of such groups.
        """
        rows = self.exchange(guard, own, compute(self.ahead(shift)))
        if rows is None:
            return None
        pairs = [(rows[rank][0], rows[rank][1]) for rank in self.chain.ranks]
        if not mismatches(pairs, shift):
            return None
        found = self.find_out(guard, pairs, compute, shift, self.chain)
        return found and self._fair(found)

    def ahead(self, shift: int) -> int:
        """Return the rank that is so many places further on than this one."""
        ranks = self.chain.ranks
        return ranks[(self._place + shift) % len(ranks)]

    def find_out(
        self,
        guard: Guard,
        pairs: Sequence[tuple[Digests, Digests]],
        compute: Callable[[int], Tensor],
        shift: int,
        chain: Chain,
        how: str = "computed",
    ) -> Verdict | None:
        """Return who was wrong, as `compare` does, of what was found to differ.

        Collective.

        Args:
            guard: as there.
            pairs: by place, what came out there, and what did for the one `shift` further on.
            compute: as there.
            shift: as there.
            chain: how what came out follows from each other.
            how: the word for what is done once more.
        """
        rank, ranks = self._training.world.rank, self.chain.ranks
        if not self.repeats(guard, compute(rank), compute(rank), how):
            return None
        again: dict[int, list[tuple[int, ...]]] = {}
        self.tried = [ranks[of] for of in tried(mismatches(pairs, shift), self.chain.together)]
        for of in map(ranks.index, self.tried):
            if (columns := self.exchange(guard, compute(ranks[of]))) is None:
                return None
            again[of] = [columns[each][0] for each in ranks]
        found = guard.call(lambda: judge(pairs, shift, again.__getitem__, chain, how=how), None)
        # It raises on every rank or on none: they have the same digests.
        if guard.off:
            guard.stop()
        if found is not None and found.divided and (apart := self._apart) >= VOTERS_MIN:
            guard.give_up(
                f"{found.evidence}, of {apart} that are wrong or right each for itself: a single "
                "one that is wrong would leave a majority, so what differs shows nothing",
                tells=self.tells,
            )
            return None
        return found

    @property
    def _apart(self) -> int:
        """How many there are that can be wrong while the others are right."""
        layout, chain = self._training.world.layout, self.chain
        if layout.dp_shard > 1:
            return layout.dp_replicate  # ranks of a replica share their weights
        return len(chain.ranks) // chain.together

    def _fair(self, found: Verdict) -> Verdict:
        """Return a verdict that convicts nobody of what another rank of its replica may have done.

        Ranks of a replica gather each other's weights: a wrong one on one of them misleads all.
        """
        layout = self._training.world.layout
        replicas = [layout.replica_of(rank) for rank in found.ranks]
        if layout.dp_shard == 1 or not found.proven or len(set(replicas)) == len(replicas):
            return found
        words = "ranks of a replica share their weights, and one may mislead the others"
        return found._replace(proven=False, evidence=f"{found.evidence}; {words}")

    def repeats(self, guard: Guard, first: Tensor, second: Tensor, how: str = "computed") -> bool:
        """Return whether ranks come to the same when they do the same; if not, the guard gives up.

        Collective. A minority of ranks that do not are no reason to give up, but to be found out.

        Args:
            guard: of the detector that asks for it.
            first: digests of what this rank came to; int64.
            second: of the same, done once more.
            how: the word for what was done.
        """
        rows = self.exchange(guard, first, second)
        if rows is not None and (reason := of_itself(rows, how)):
            # All ranks come to the same: they have the same digests.
            guard.give_up(reason, tells=self.tells)
        return not guard.stopped

    def alike(self, guard: Guard) -> bool:
        """Return whether ranks compute on processors of one kind; if not, the guard gives up.

        Collective. On another kind a sound rank comes to other bits, and looks like a broken one.

        Args:
            guard: of the detector that asks for it.
        """
        own = processors.kind(self._training.world.device)
        rows = self.exchange(guard, processors.number(own))
        if rows is not None and (kinds := len({number for (number,) in rows})) > 1:
            reason = (
                f"ranks compute on {kinds} kinds of processors, this one on {own}: what differs "
                "elsewhere shows nothing"
            )
            guard.give_up(reason, tells=self.tells)
        return not guard.stopped

    def agree(
        self, guard: Guard, own: Tensor, compute: Callable[[int], Tensor], shift: int
    ) -> bool:
        """Return whether ranks come to what others do, in a test; if not, the guard gives up.

        Collective. Whoever differs may have other kernels, and is not accused of anything.

        Args:
            guard: of the detector that asks for it.
            own: as in `compare`, and so are the others.
            compute: see there.
            shift: see there.
        """
        rows = self.exchange(guard, own, compute(self.ahead(shift)))
        if rows is None:
            return False
        pairs = [(rows[rank][0], rows[rank][1]) for rank in self.chain.ranks]
        if found := mismatches(pairs, shift):
            reason = (
                f"{len(found)} of {len(pairs)} micro-batches come out otherwise in another process "
                f"({shown(found, self.chain)}): what differs later shows nothing"
            )
            guard.give_up(reason, tells=self.tells)
        return not guard.stopped

    @property
    def good(self) -> int:
        """The last step whose state is known to be good; 0 if it is known of none."""
        return self._verified or 0

    def sound(self, step: int) -> None:
        """Hear that nothing was found wrong in a step; what led to it is vouched for."""
        self._verified = max(step - 1, self._verified or 0)

    def done(self) -> None:
        """Hear that a step is over, and moves something."""
        self.again, self._tries, self._told = False, 0, False

    def throw_away(
        self, step: int, found: Verdict, reporter: Told, *, since: int | None = None
    ) -> None:
        """Say who was wrong in a step that moves nothing, and have it computed again.

        Args:
            step: its number.
            found: who.
            reporter: hears of it, once for a step.
            since: the last step whose state is known to be good; None for what replays vouch for.

        Raises:
            Aborted: by the reporter, if it does not come out well, and orders have come.
        """
        world = self._training.world
        guilty = found.ranks if found.proven else ()
        innocent = [rank for rank in range(world.size) if rank not in guilty]
        tellers = (innocent or range(world.size))[:TELLERS]
        if world.rank in tellers and not self._told:
            reporter.diverged(
                step - 1,
                since=self.good if since is None else since,
                ranks=found.ranks,
                proven=found.proven,
                evidence=f"in step {step}, {found.evidence}",
                of_data=found.of_data,
            )
        self.again, self._tries, self._told = True, self._tries + 1, True
        if self._tries > RETRIES_MAX:
            await_orders(reporter)

    def add_up_again(
        self,
        step: int,
        evidence: str,
        reporter: Told,
        ranks: tuple[int, ...] = (),
        *,
        since: int | None = None,
    ) -> None:
        """Have a step computed again that is wrong, nobody knows by whose fault.

        What came out wrong once moves nothing and is noted; what stays wrong is told.

        Args:
            step: its number.
            evidence: what is wrong with it.
            reporter: hears of it.
            ranks: that are suspected.
            since: as in `throw_away`.

        Raises:
            Aborted: by the reporter, if it does not come out well, and orders have come.
        """
        self.again, self._tries = True, self._tries + 1
        if self._tries <= RETRIES_MAX:
            if self.tells:
                reporter.threw_away(step, because=evidence)
            return
        if self.tells and not self._told:
            words = f"in step {step}, at last in the {self._tries}th attempt, {evidence}"
            good = self.good if since is None else since
            reporter.diverged(step - 1, since=good, ranks=ranks, proven=False, evidence=words)
        await_orders(reporter)

    def exchange(self, guard: Guard, *digests: Tensor) -> list[list[tuple[int, ...]]] | None:
        """Return the digests of all ranks; None where one has none: the detector stops on all.

        Collective.

        Args:
            guard: of the detector that asks for it.
            digests: of this rank; int64, of one size.
        """
        # Where a detector has stopped, there is a zero on the host in place of what a GPU came to.
        device = self._training.world.device
        own = halves(torch.stack([each.reshape(-1).to(device) for each in digests]))
        rows = self._training.world.gather(torch.cat((own.new_tensor([guard.off]), own)))
        if any(row[0] for row in rows):
            guard.stop()
            return None
        each = digests[0].numel()
        found = []
        for _, *row in rows:
            words = [joined(low, high) for low, high in zip(row[::2], row[1::2], strict=True)]
            found.append([tuple(words[at : at + each]) for at in range(0, len(words), each)])
        return found


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
