"""Ring replay within the steps of a training: when, with whom, and of what."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from trainer import apply, processors
from trainer.blame import Verdict
from trainer.data import Batches
from trainer.doubts import Doubts
from trainer.gradients import Probe
from trainer.guard import Guard
from trainer.pipeline import Micro
from trainer.products import Seen
from trainer.readings import Readings
from trainer.replay import Pace
from trainer.ring import Ring, Stepping, Told
from trainer.strikes import Strikes
from trainer.sums import Sums
from trainer.tracing import Trace
from trainer.turns import Turns

COSTS = 2
"""Numbers that a rank says in a step of what it takes it to look: a replay, and its own norms."""
MOMENT_S = 1e-6
T = TypeVar("T", bound=Told)


class Replays:
    """Those of one rank: of last micro-batches every so many steps, and of steps that stand out.

    Args:
        training: whose steps they are of.
        samples: of all ranks.
        share: of the time of a step, that they may take.
        norms: of the time of a step, that norms and sums of this rank's own gradient may take.
        watched: whether both come in every step, whatever they take.
        untested: whether there are replays where ranks are not known to come to the same bits, if
            a test says that they do.

    Attributes:
        passed: how much further on the rank is whose last micro-batch came out the same here, if
            there was a replay in this step and none of any rank came out otherwise; else 0.
    """

    def __init__(
        self,
        training: Stepping,
        samples: Batches,
        share: float,
        norms: float,
        *,
        watched: bool = False,
        untested: bool = False,
    ) -> None:
        self._training = training
        self.ring = Ring(training, samples)
        self.turns = Turns(1.0 if watched else norms, 1)
        self.doubts = Doubts(training, self.ring, self.turns)
        self.readings = Readings(self.ring)
        layout = training.world.layout
        by_itself = layout.tp == 1 and layout.pp == 1
        self.sums = Sums(self.ring, layout.dp_replicate, possible=by_itself)
        self.pace = Pace(share, training.share, layout.pp, watched=watched)
        self._guard = Guard("replays")
        device = training.world.device
        compiled = apply.compiles(training.job, device)
        self._probe, self._seen = Probe(self._guard, compiled=compiled), Seen()
        pipeline = training.pipeline
        self._trace: Trace | None = None
        if pipeline is not None:
            self._trace = Trace(self._guard, pipeline.numbers, device, compiled=compiled)
        known = processors.known_to_repeat(device)
        self._possible = known or untested
        self._strikes: Strikes | None = None
        if not known:
            self._strikes = Strikes(max(layout.readers, 2))
        self._before_strikes: int | None = None
        """The last step that was known to be good when a device first came to other bits."""
        self._due = self._tested = False
        self._number = self.passed = 0
        self._micro: Micro | None = None
        self._took_s = self._cost = 0.0
        """Seconds of the replay in this step, and what it came to in the last one."""
        self._own = torch.zeros((), dtype=torch.int64)

    def forget(self) -> None:
        """Begin as after a restore: the state is another one than a moment ago."""
        self.ring.forget()
        self.doubts.forget()
        self.readings.forget()
        self.sums.forget()

    def begin(self, step: int) -> None:
        """Begin to compute a step, or begin anew."""
        self.passed = 0
        self.ring.begin(step, self.pace.longest)
        self.doubts.begin(step)
        self.readings.begin(step)
        # Not in the first step of a process, which makes what gradients are looked at on.
        regular = step % self.pace.every == 0 or not self._tested
        # What was thrown away is looked at however it came to that, or it is taken on trust.
        due = self._training.warm and (regular or self.ring.again)
        self._due = due and self._possible and not self._guard.stopped

    def following(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Return a block in which a micro-batch of this rank is computed forward."""
        if self._due and last:
            return self._probe.following(self._training.stages[0])
        return contextlib.nullcontext()

    def before(self, *, last: bool) -> None:
        """Watch the gradient of the micro-batch that comes next."""
        self.doubts.before(self._training.stages[0], last=last)
        if self._due and last:
            self._probe.begin(self._training.stages[0])

    def trace(self) -> Trace | None:
        """Return who is to look at the last micro-batch of a pipeline's step, if somebody is."""
        if not self._due or self._trace is None:
            return None
        self._trace.begin()
        return self._trace

    def after_pipeline(self, micro: Micro) -> None:
        """Take note of the last micro-batch of a pipeline's step, and of what it came to."""
        if self._due and self._trace is not None:
            self._own, self._micro = self._trace.end(), micro

    def after(self, loss: Tensor, micro: Micro, *, last: bool) -> None:
        """Take note of a micro-batch of this rank, and of what it came to."""
        self.doubts.after(loss, micro)
        if self._due and last:
            self._own, self._micro = self._probe.end(loss), micro
            self._seen.begin()
            self._see(self._training.world.rank)

    def differ(self, step: int, reporter: T, mended: Callable[[int, T], bool]) -> bool:
        """Compute another rank's micro-batch; return whether the step is to be thrown away.

        Args:
            step: its number.
            reporter: hears of it.
            mended: is asked what differs if something does: it returns whether that was the state
                of ranks, and no longer is.
        """
        if not self._due:
            return False
        if not self._tested:
            self._test(step, reporter)
        shift = self._next_shift()
        found, begun = None, time.monotonic()
        if not self._guard.stopped:
            found = self.ring.compare(
                self._guard, self._own, lambda of: self._replay(step, of, reporter), shift
            )
        self._guard.tell(reporter)
        if self._guard.given_up:
            self.doubts.give_up(self._guard.reason)
        if found is not None:
            where = self._where(found)
            if where:
                found = found._replace(evidence=f"{found.evidence}; {where}")
            return mended(step, reporter) or self._thrown_away(step, found, reporter)
        if not self._guard.stopped:
            self.ring.sound(step)
            self.passed = shift
            self._took_s = time.monotonic() - begun
        return False

    def _next_shift(self) -> int:
        """Return another neighbour each time: two that err alike are not always paired."""
        readers = self._training.world.layout.readers
        shift = self.ring.chain.together * (1 + self._number % (readers - 1))
        self._number += 1
        return shift

    def _thrown_away(self, step: int, found: Verdict, reporter: Told) -> bool:
        """Throw a step away, and say who was wrong as far as that is evidence; it may be none."""
        if self._strikes is None:
            self.ring.throw_away(step, found, reporter)
            return True
        if self._before_strikes is None:
            self._before_strikes = self.ring.good
        believed = self._strikes.hear(found)
        if self._strikes.reason:
            self._guard.give_up(self._strikes.reason, tells=self.ring.tells)
            self._guard.tell(reporter)
            return False
        if believed is None:
            self.ring.add_up_again(step, found.evidence, reporter, found.ranks)
        else:
            # Replays that came out well in between vouch for nothing of what errs at times.
            self.ring.throw_away(step, believed, reporter, since=self._before_strikes)
        return True

    def done(self) -> None:
        """Hear that a step is over, and moves something."""
        self.ring.done()
        with self._counted():
            self.doubts.done()

    def stepped(self, seconds: float, spent_s: float) -> None:
        """Hear for how long a step took; what a replay in it has cost is said in the next one.

        Args:
            seconds: from its begin to its end.
            spent_s: of this thread's processor time.
        """
        self._cost = self._took_s / max(seconds - self._took_s, MOMENT_S)
        self._took_s = 0.0
        self.turns.stepped(spent_s)

    def agree(self, costs: Sequence[Sequence[float]]) -> None:
        """Hear `COSTS` numbers of each rank, of what looks take it: all come as often as that says.

        Of a step that counts, once it is over.
        """
        replays, looks = zip(*costs, strict=True)
        self.pace.paid(replays)
        self.turns.agree(looks)

    def words(
        self, step: int, part: Sequence[Tensor], alive: Callable[[], None]
    ) -> tuple[float, ...]:
        """Return what this rank tells the others in a step, in the order of `step.DOUBT_AT` on.

        Args:
            step: its number.
            part: of the gradient, that this rank moves weights by.
            alive: is called now and then while this waits.
        """
        with self._counted():
            doubt = self.doubts.word()
            sums = self.sums.words(self.doubts.put_in, part)
        costs = (self._cost, self.turns.word())
        return doubt, *costs, *self.readings.words(step, alive), *sums

    def _counted(self) -> contextlib.AbstractContextManager[None]:
        """Count a block as looking, if it is this step's turn."""
        return self.turns.looking() if self.doubts.due else contextlib.nullcontext()

    def _test(self, step: int, reporter: Told) -> None:
        """Find out if bits mean anything here: if a micro-batch comes out the same twice.

        Where it does not, on most ranks, or can not elsewhere, nothing that is computed once more
        is evidence. Where it is not known to come out the same elsewhere, it has to once.
        """
        self._tested = True
        own = self._training.world.rank
        if self.ring.alike(self._guard):
            again = self._replay(step, own, reporter)
            if self.ring.repeats(self._guard, self._own, again) and self._strikes is not None:
                self.ring.agree(
                    self._guard,
                    self._own,
                    lambda of: self._replay(step, of, reporter),
                    self._next_shift(),
                )

    def _replay(self, step: int, of: int, reporter: Told) -> Tensor:
        """Return what the last micro-batch of a rank comes to here."""
        # Without it, its own: other ranks wait for this one to take part in what follows.
        assert self._micro is not None
        micro = self.ring.read(self._guard, step, self.ring.share(of)[-1], self._micro, reporter)
        if self._trace is not None:
            self._trace.begin()
            self.ring.follow(micro, self._trace, reporter)
            return self._trace.end()
        follows = self._probe.following
        losses = self.ring.compute(self._guard, [micro], self._look, reporter, follows)
        came = self._probe.end(losses[0] if losses else torch.zeros(()))
        self._see(of)
        return came

    def _see(self, of: int) -> None:
        if (products := self._probe.products) is not None:
            self._guard.call(lambda: self._seen.take(of, products), None)

    def _where(self, found: Verdict) -> str:
        """Say where ranks that were wrong first differed; "" where nobody knows.

        Where several ranks compute a micro-batch together, each has other products of it.
        """
        if self._probe.products is None or self.ring.chain.together > 1 or not self.ring.tried:
            return ""
        return self._seen.where(self._training.world, self.ring.tried, found.ranks)

    def _look(self, model: nn.Module, _: int) -> None:
        self._probe.begin(model)
