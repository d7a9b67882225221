"""Computes a slice of each update twice, on other lanes of the device, and compares the bits.

What the optimizer makes of a sharded state is on no other rank: if a unit gets it wrong there,
every replica of layers takes that over, and nothing that is compared would show it. So in every
step a part of the weights, another one each time, is updated once more from what the update found,
in the opposite order of its numbers. If that came out otherwise it is done a third time, two places
further on, and of each number what came out twice is kept. A fault that is always the same and on
all lanes is not seen.

That means something only where what comes out does not depend on where a number stands, which is
found out at first (trainer/lanes.py).

Beside that, what is true of any state that AdamW has made must be true of it: second moments are
not negative, and first moments are bounded by them, and thereby updates by the learning rate.

What a rank has against its own device it tells with the next step, once it knows how many others
have something against theirs: if most do it is what looks that is wrong, and all go on without.

Letters: N numbers of the slice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer import lanes
from trainer.guard import Guard
from trainer.optim import BETAS, Optimizer, Part, ShardState

FLOPS_PER_WORD = {"cpu": 2_000.0, "cuda": 20_000.0}
"""What it takes to update a number once more and to compare, in operations of training that the
device could do meanwhile. A busy core needed some 65 ns for that of `WORDS_MIN` at a time, and does
some 30 GFLOPS in float32; a GPU moves 110 bytes for it at 3 TB/s, and does some 500 TFLOPS in bf16,
which nobody has measured."""
WORDS_MIN = 1 << 15
"""Of fewer, calls take longer than numbers: then it is done more rarely, of so many. Of more,
memory is taken from the system anew in each call."""
WORDS_MAX = 1 << 21
"""Some 80 bytes of memory are taken for each while it is looked at, beside the peak of training."""
ROOM = 1.01
"""By which rounding may exceed the bound of moments: a few of 2**-24 in each of some 20 steps."""
TINY = 1e-18
"""First moments below this say nothing: their squares are below what a float32 can be."""
TOLD_MAX = 8
"""Repairs of a generation that are told: a unit that is always wrong is wrong in every step."""
TELLERS = 2
"""Ranks that report what all know; if one of them is lost, the other has said it."""


class Told(Protocol):
    """Who hears of it; `trainer.reporter.Reporter`."""

    def repaired(
        self, step: int, *, rank: int, source: int, tensors: Sequence[str], seconds: float
    ) -> None:
        """Hear that an update came out wrong, and is right now; `source` is `rank`."""

    def diverged(
        self, step: int, *, since: int, ranks: Sequence[int], proven: bool, evidence: str
    ) -> None:
        """Hear that some ranks compute wrongly, or may do."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""


class Claim(NamedTuple):
    """What a rank has against its own device."""

    step: int
    since: int
    evidence: str


class Pace(NamedTuple):
    """How much of an update is looked at."""

    words: int
    """Numbers at a time."""
    apart: int
    """Steps from one time to the next."""

    @classmethod
    def of(cls, share: float, flops: float, device: str, whole: int) -> Pace:
        """Return the one that takes a share of the time of steps.

        Args:
            share: of the time, above 0.
            flops: operations that a rank does in a step.
            device: where it does them, `cpu` or `cuda`.
            whole: all numbers that there are.

        >>> Pace.of(0.002, 1.7e9, "cpu", 10**6), Pace.of(0.002, 1e12, "cpu", 10**8)
        (Pace(words=32768, apart=20), Pace(words=1000000, apart=1))
        """
        words = share * flops / FLOPS_PER_WORD[device]
        least = max(min(WORDS_MIN, whole), 1)
        if words >= least:
            return cls(min(int(words), WORDS_MAX), 1)
        return cls(least, math.ceil(least / words))


def bound_of_moments(steps: int) -> float:
    """Return how many times the root of the second moment the first one is at most.

    By Cauchy and Schwarz, whatever the gradients were, of moments that began with 0. Of the number
    of steps it depends for the first few; it is 1.165 for many.

    >>> round(bound_of_moments(1), 3), round(bound_of_moments(1000), 3)
    (0.447, 1.165)
    """
    first, second = BETAS
    ratio = first * first / second
    return (1 - first) / math.sqrt(1 - second) * math.sqrt((1 - ratio**steps) / (1 - ratio))


class Updates:
    """Those of one rank.

    Args:
        optimizer: whose.
        pace: how much of it is looked at.
        rank: this one.
    """

    def __init__(self, optimizer: Optimizer, pace: Pace, rank: int) -> None:
        self._optimizer, self._rank = optimizer, rank
        self._guard = Guard("updates")
        self._sizes = [shard.param.numel() for shard in optimizer.shards]
        self._total = sum(self._sizes)
        self._words, self._apart = min(pace.words, self._total), pace.apart
        self.period = math.ceil(self._total / max(self._words, 1)) * self._apart
        """In so many steps, all of this rank's weights are looked at once."""
        self._tested = False
        self._found: list[Part] = []
        """What the update of this step finds, of those that decay, and of the others."""
        self._told = 0
        self._claims: list[Claim] = []
        """That are not told yet."""

    def forget(self) -> None:
        """Begin as after a restore: the state is another one than a moment ago."""
        self._claims = []

    def word(self) -> float:
        """Return what this rank tells the others in a step: whether it has a claim."""
        return float(bool(self._claims))

    def agree(self, words: Sequence[float], reporter: Told) -> None:
        """Tell what this rank has against its own device, unless most have.

        Args:
            words: of all ranks, alike everywhere: all go on without looking, or none.
            reporter: hears of it.
        """
        count = sum(map(bool, words))
        if count > 1 and 2 * count > len(words):
            self._claims = []
            self._guard.give_up(
                f"{count} of {len(words)} ranks have something against their own devices at once, "
                "which is rather against what looks at updates",
                tells=self._rank < TELLERS,
            )
            self._guard.tell(reporter)
        self.tell(reporter)

    def tell(self, reporter: Told) -> None:
        """Tell what this rank has against its own device, with nobody left to ask."""
        claims, self._claims = self._claims, []
        for claim in claims:
            reporter.diverged(
                claim.step,
                since=claim.since,
                ranks=(self._rank,),
                proven=False,
                evidence=claim.evidence,
            )

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Remember what the update of a step finds, of the slice that is due."""
        if step % self._apart == 0 and self._total:
            self._found = self._guard.call(lambda: _joined(self._slice(step)), [])

    @torch.no_grad()
    def after(self, step: int, grad_norm: float, reporter: Told) -> None:
        """Compare what the update has come to, and keep what comes out twice.

        Args:
            step: its number.
            grad_norm: as the update was given it.
            reporter: hears of it.
        """
        found, self._found = self._found, []
        if found:
            fault = self._guard.call(lambda: self._test(step), "")
            since = max(step - self.period - 1, 0)
            if fault:
                self._claims.append(Claim(step, since, fault))
            wrong = self._guard.call(lambda: self._settle(found, step, grad_norm), None)
            if wrong is not None:
                self._tell(step, wrong, reporter)
            if math.isfinite(grad_norm) and self._told < TOLD_MAX:
                broken = self._guard.call(lambda: self._broken(found, step), "")
                if broken:
                    self._told += 1
                    self._claims.append(Claim(step, since, broken))
        self._guard.tell(reporter)

    def _test(self, step: int) -> str:
        """Find out, once, if comparing means something; return what is wrong if a lane is."""
        if self._tested:
            return ""
        self._tested = True
        said = lanes.look(self._optimizer, step)
        if said.unlike:
            self._guard.give_up(said.unlike, tells=True)
        return said.fault

    def _settle(self, found: list[Part], step: int, grad_norm: float) -> _Outcome | None:
        """Put right what two of three times come out otherwise; None if nothing came out otherwise.

        Each number stands on another lane each time, so that one lane that is wrong is wrong about
        three different numbers, and outvoted about each.
        """
        slices = self._slice(step)
        first, second = _joined(slices), lanes.backwards(self._optimizer, found, step, grad_norm)
        if lanes.same(first, second):
            return None
        third = lanes.turned(self._optimizer, found, step, grad_norm)
        wrong: list[str] = []
        undecided = 0
        for group, *times in zip(_grouped(slices), first, second, third, strict=True):
            votes = [_voted(*each) for each in zip(*map(lanes.outcome, times), strict=True)]
            undecided += sum(count for _, count in votes)
            sizes = [_filled(part.param) for part in group]
            pieces = zip(*(torch.split(most, sizes) for most, _ in votes), strict=True)
            for part, values in zip(group, pieces, strict=True):
                right = (value[: part.param.numel()] for value in values)
                pairs = list(zip(lanes.outcome(part), right, strict=True))
                if not all(lanes.alike(now, value) for now, value in pairs):
                    wrong.append(f"weights of {part.name}")
                    for now, value in pairs:
                        now.copy_(value)
        return _Outcome(wrong, undecided)

    def _tell(self, step: int, found: _Outcome, reporter: Told) -> None:
        self._told += 1
        if self._told > TOLD_MAX:
            return
        own = self._rank
        if found.undecided:
            words = (
                f"in step {step}, {found.undecided} numbers of an update came out in three ways, "
                "and nobody can say which is right"
            )
            self._claims.append(Claim(step, step - 1, words))
        else:
            reporter.repaired(step, rank=own, source=own, tensors=found.wrong, seconds=0.0)

    def _broken(self, found: list[Part], step: int) -> str:
        """Say what can not be true of what AdamW has made; "" if nothing."""
        bound = bound_of_moments(step) * ROOM
        slices = self._slice(step)
        for before, part in zip(found, _joined(slices), strict=True):
            allowed_N = part.exp_avg_sq * bound**2 + TINY**2
            sound_N = (part.exp_avg.square() <= allowed_N) & part.param.isfinite()
            # Numbers that were none before are the data's, or were told of.
            if sound_N.all() or not all(each.isfinite().all() for each in before[2:]):
                continue
            where = next(
                each.name
                for each in slices
                if each.decays is part.decays and not _sound(each, bound)
            )
            what = "its numbers are not finite"
            if (part.exp_avg_sq < 0).any():
                what = "second moments are negative"
            elif part.param.isfinite().all():
                what = "first moments are larger than second ones allow"
            return f"in step {step}, {what}, of {int((~sound_N).sum())} numbers from {where} on"
        return ""

    def _slice(self, step: int) -> list[Part]:
        """Return what is due in a step, in place; a piece of each weight that has part in it."""
        first = step // self._apart * self._words % self._total
        spans = [(first, first + self._words)]
        if first + self._words > self._total:
            spans = [(first, self._total), (0, first + self._words - self._total)]
        parts, at = [], 0
        for shard, size in zip(self._optimizer.shards, self._sizes, strict=True):
            for begin, end in spans:
                low, high = max(begin - at, 0), min(end - at, size)
                if low < high:
                    # So that it is known which lane each number was on.
                    parts.append(_part(shard, low - low % lanes.LANES, high))
            at += size
        return parts


class _Outcome(NamedTuple):
    """What came of an update that did not come out the same twice."""

    wrong: list[str]
    """Weights that were put right; none if it was the second time that was wrong."""
    undecided: int
    """Numbers that came out in three ways, and are left as they were."""


def _voted(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, int]:
    """Return what came out twice of each number, or the first if none did; and of how many."""
    one, two, three = (each.view(torch.int32) for each in (first, second, third))
    outvoted = (one != two) & (one != three)
    undecided = outvoted & (two != three)
    right = torch.where(outvoted & ~undecided, two, one)
    return right.view(torch.float32), int(undecided.sum())


def _part(shard: ShardState, low: int, high: int) -> Part:
    assert shard.param.grad is not None, f"no gradient for {shard.name}"
    tensors = (shard.param, shard.param.grad, shard.exp_avg, shard.exp_avg_sq)
    flat = (tensor.detach().view(-1)[low:high] for tensor in tensors)
    return Part(shard.name, shard.weight.ndim > 1, *flat)


def _grouped(parts: list[Part]) -> list[list[Part]]:
    """Return those that decay, and the others, as far as there are some."""
    groups = ([part for part in parts if part.decays is decays] for decays in (True, False))
    return [group for group in groups if group]


def _joined(parts: list[Part]) -> list[Part]:
    """Return copies of parts, those in one that are updated alike: it takes a call for each.

    Each of them is on the lanes that it is on where it is, with nothing behind it that would shift
    those of the next.
    """
    return [
        Part("", group[0].decays, *map(_on_lanes, zip(*(part[2:] for part in group), strict=True)))
        for group in _grouped(parts)
    ]


def _on_lanes(tensors: Sequence[Tensor]) -> Tensor:
    filler = torch.zeros(lanes.LANES, device=tensors[0].device)
    pairs = ((tensor, filler[: _filled(tensor) - tensor.numel()]) for tensor in tensors)
    return torch.cat(list(itertools.chain.from_iterable(pairs)))


def _filled(tensor: Tensor) -> int:
    """Return how many numbers a part takes with what is put behind it."""
    return -(-tensor.numel() // lanes.LANES) * lanes.LANES


def _sound(part: Part, bound: float) -> bool:
    allowed_N = part.exp_avg_sq * bound**2 + TINY**2
    return bool(((part.exp_avg.square() <= allowed_N) & part.param.isfinite()).all())
