"""Steps whose numbers stand out are computed once more by other ranks, before they move anything.

Numbers that are not finite, or much larger than usual, are a reason to look and prove nothing: of
a hundred such steps of real runs some six are a device's fault (Gemini 2.5, arXiv 2507.06261), and
the others that of the data. So all ranks compute the micro-batches of another replica, and compare
what all of a step came to. If that is the same everywhere, the run goes on as it would have; else
it is found out who was wrong, and the step is thrown away.

Which ranks stand out goes over with what ranks tell each other in every step, so that all of them
look again, or none.

The loss and the gradient of the whole world are there in every step anyway. What a rank has come to
by itself takes a look at all of its gradient, for which there are turns. If the whole stands out in
between, the step is computed again by everybody, and looked at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from trainer import processors
from trainer.digest import digest
from trainer.gradients import Norms, PutIn
from trainer.guard import Guard
from trainer.outliers import Outliers
from trainer.pipeline import Micro
from trainer.ring import Ring, Stepping, Told
from trainer.turns import Turns

QUIET, OFF = 0.0, -1.0
"""What a rank says if nothing stands out, and if it does not look any more."""
AT_ONCE = 8.0
STEPS_EACH = 100
"""So many looks at once, and one more for so many steps: a run that diverges for good, every step
of which stands out, is not to take twice as long."""
SHOWN_MAX = 3


class Doubts:
    """Those of one rank.

    Args:
        training: whose steps they are about.
        ring: who computes once more.
        turns: in which steps it looks at its own gradient.
    """

    def __init__(self, training: Stepping, ring: Ring, turns: Turns) -> None:
        self._training, self._ring, self._turns = training, ring, turns
        self._guard = Guard("outliers")
        self._possible = processors.known_to_repeat(training.world.device)
        self._norms = Norms(self._guard, turns, each=not training.adds_up_in_place)
        self.due = False
        """Whether this rank looks at its own gradient in this step."""
        self._why = ""
        """Why this step is computed again, if that is only because nobody had looked at it."""
        self._own, self._whole = Outliers(), Outliers()
        self._values: list[float] = []
        self.put_in: PutIn | None = None
        """What this rank adds to the gradient, once its `word` was asked for."""
        self._usual: list[tuple[Outliers, list[float]]] = []
        """What later steps are to be compared with, too, if this one counts."""
        self._micro: Micro | None = None
        self._looks = AT_ONCE

    def forget(self) -> None:
        """Compare later steps with none before: they are of another kind, or another state."""
        self._own.forget()
        self._whole.forget()
        self._looks, self._why = AT_ONCE, ""

    def remembered(self) -> tuple[Outliers, Outliers]:
        """Return what later steps are compared with, for `remember`."""
        return copy.copy(self._own), copy.copy(self._whole)

    def remember(self, known: tuple[Outliers, Outliers]) -> None:
        """Go on as when that was `remembered`."""
        self._own, self._whole = map(copy.copy, known)

    def begin(self, step: int) -> None:
        """Begin to compute a step, or begin anew."""
        self.due = self._looking and (self._ring.again or step % self._turns.every == 0)
        self._norms.begin()
        self._values, self._micro, self.put_in = [], None, None

    def before(self, model: nn.Module, *, last: bool) -> None:
        """Look at the gradient of the micro-batch that comes next."""
        if self.due:
            self._norms.before(model, last=last)

    def after(self, loss: Tensor, micro: Micro) -> None:
        """Take note of a micro-batch of this rank."""
        if self.due:
            self._norms.after(loss)
            self._micro = micro

    def word(self) -> float:
        """Return by which factor something of this rank stands out in this step, or `QUIET`, `OFF`.

        Infinity if something is not finite.
        """
        if not self._looking:
            return OFF if self._guard.off else QUIET
        return self._guard.call(self._largest_factor, OFF) if self.due else QUIET

    def differ(
        self, step: int, words: Sequence[float], loss: float, grad_norm: float, reporter: Told
    ) -> bool:
        """Have a step that stands out be computed once more; return whether it is thrown away.

        Args:
            step: its number.
            words: of all ranks, so that all come to the same.
            loss: of the global batch.
            grad_norm: of its gradient.
            reporter: hears of it.
        """
        why, before = self._doubted(words, loss, grad_norm), self._why
        self._guard.tell(reporter)
        if why and not self.due:
            self._why, self._ring.again = why, True
            return True
        self._why = ""
        if why:
            return self._compare(step, why, loss, grad_norm, reporter)
        if before and self._ring.tells:
            reporter.threw_away(step, because=f"{before}, and not when it was computed again")
        return False

    def _doubted(self, words: Sequence[float], loss: float, grad_norm: float) -> str:
        """Return why a step is to be computed once more, alike on every rank; "" if it is not."""
        if OFF in words:
            self._guard.stop()
        if not self._looking:
            return ""
        whole = [loss, grad_norm]
        out = self._whole.standing_out(whole)
        self._usual = []
        if self.due and words[self._training.world.rank] == QUIET:
            self._usual.append((self._own, self._values))
        if not out:
            self._usual.append((self._whole, whole))
        if not self._ring.again:
            self._looks = min(self._looks + 1 / STEPS_EACH, AT_ONCE)
        if not out and not any(words):
            return ""
        if not self._ring.again:
            if self._looks < 1:
                return ""
            self._looks -= 1
        said = [
            _words(f"rank {rank}'s loss or gradient of a weight", factor)
            for rank, factor in enumerate(words)
            if factor
        ]
        names = ("the loss", "the gradient's norm")
        said += [_words(names[at], self._whole.times_usual(whole, at)) for at in out]
        return "; ".join(said[:SHOWN_MAX])

    def _compare(self, step: int, why: str, loss: float, grad_norm: float, reporter: Told) -> bool:
        """Compute all of another replica's step; return whether it is to be thrown away."""
        layout = self._training.world.layout
        # Ranks of a replica meet in every pass, so they compute as many: those of one other.
        unit = layout.shard_count if layout.dp_replicate > 1 else self._ring.chain.together
        shift = unit * (1 + step % (layout.world_size // unit - 1))
        own = self._guard.call(lambda: _fingerprint(self._values), _nothing())
        found = self._ring.compare(
            self._guard, own, lambda of: self._replay(step, of, reporter), shift
        )
        self._guard.tell(reporter)
        if found is not None:
            found = found._replace(evidence=f"{why}; {found.evidence}")
            self._ring.throw_away(step, found, reporter)
            return True
        if self._guard.stopped:
            return False
        self._ring.sound(step)
        self._own.let_be(self._values)
        self._whole.let_be([loss, grad_norm])
        reporter.looked_again(step, because=why)
        return False

    def done(self) -> None:
        """Hear that a step is over, and moves something: it counts."""
        for outliers, values in self._usual:
            self._guard.call(partial(outliers.admit, values), None)
        self._usual = []

    def give_up(self, reason: str) -> None:
        """Look at nothing any more, on all ranks: what is computed once more shows nothing."""
        if self._possible:
            self._guard.give_up(reason, tells=self._ring.tells)

    @property
    def _looking(self) -> bool:
        # Not in the first step of a process, which makes what gradients are looked at on; and not
        # at pipelines, where whoever is wrong once has misled all by the end of the step.
        training = self._training
        if not training.warm or training.pipeline is not None:
            return False
        stopped = self._guard.off or self._guard.stopped
        return self._possible and not stopped

    def _largest_factor(self) -> float:
        self._values = values = self._norms.found()
        self.put_in = self._norms.put_in()
        out = self._own.standing_out(values)
        return max((self._own.times_usual(values, at) for at in out), default=QUIET)

    def _replay(self, step: int, of: int, reporter: Told) -> Tensor:
        """Return the fingerprint of what all micro-batches of a rank come to here."""
        assert self._micro is not None
        shares = self._ring.share(of)
        micros = [
            self._ring.read(self._guard, step, each, self._micro, reporter) for each in shares
        ]
        self._norms.begin()
        losses = self._ring.compute(
            self._guard,
            micros,
            lambda model, number: self._norms.before(model, last=number == len(micros) - 1),
            reporter,
        )
        for loss in losses:
            self._norms.after(loss)
        return self._guard.call(lambda: _fingerprint(self._norms.found()), _nothing())


def _fingerprint(values: Sequence[float]) -> Tensor:
    # What is no number has many forms, of which nobody promises which one comes out.
    numbers = [math.nan if math.isnan(value) else value for value in values]
    return digest(torch.tensor(numbers, dtype=torch.float64), "step")


def _nothing() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def _words(what: str, factor: float) -> str:
    if math.isfinite(factor):
        return f"{what} is {factor:.3g} times as large as usual"
    return f"{what} is not finite"
