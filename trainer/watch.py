"""Digests the training state of a rank as it trains, piece by piece, within a budget per step.

All ranks that hold the same shard digest the same piece at the same step, so that somebody who
hears of all of them can compare. State is looked at right before it is used up: after the backward
pass of a step, before the step moves the weights. What happened to it since the step before, in
memory or in the optimizer's arithmetic, is in it then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from orchestrator.protocol.digests import Kind, Taken
from orchestrator.protocol.ids import Step
from trainer.digest import PIECE_WORDS, digest, unsigned
from trainer.guard import Guard
from trainer.turns import Turns

FLOPS_PER_WORD = {"cpu": 60.0, "cuda": 600.0, "cuda, not fused": 12_000.0}
"""What a word costs, in operations of training that the device could do meanwhile, until that is
measured. A core reads 3 GB/s of words and does some 45 GFLOPS in float32. A GPU reads 1.8 TB/s of
words in one pass, three fifths of what it copies, and does some 500 TFLOPS in bf16, hence a little
over 1,000: half of it, since nobody reaches that. Operation by operation it moves each word some
twenty times. None of it was measured on a GPU."""
PIECE_WORDS_ON_GPUS = 1 << 24
"""A GPU reads so many while it is asked for the next; where they are fused, nothing is made of them
on the way."""
CALL_WORDS = 20_000
"""What takes as long to be asked for as so many words to be digested: a piece, of any size."""
TURN_WORDS = 1 << 20
"""Fewer are not digested in a step, but more in another one: for the first piece of a step nothing
of this program is in the core's caches, and it takes as long as 200,000 words."""


class Held(NamedTuple):
    """Tensors of one kind that a rank holds, in the same order on each that holds the same."""

    kind: Kind
    tensors: Sequence[tuple[str, Tensor]]


class _Piece(NamedTuple):
    kind: Kind
    name: str
    place: int
    """Of its tensor, among those of its kind."""
    start: int
    words: int


class Hears(Protocol):
    """Who is told of digests; `orchestrator.worker.Worker` does."""

    def digested(self, taken: Taken, digests: dict[Kind, int]) -> None:
        """Take in what was digested at a step."""

    def detector_failed(self, detector: str, reason: str) -> None:
        """Hear that this rank goes on without a detector."""


class Watch:
    """What is digested when: each piece once in as many steps as `turns` say.

    Args:
        held: the state as it is now; tensors of later calls have the same sizes.
        turns: the same on every rank.
    """

    def __init__(self, held: Iterable[Held], turns: Turns) -> None:
        # The largest first, each to the emptiest slot: the same on everybody who has the same.
        self._pieces = sorted(_pieces(held), key=lambda piece: -piece.words)
        self.turns = turns
        self._changed_at, self._before = 0, 0
        """After which step turns came to be others, and how many steps they were apart before."""
        self._slots = self._cut()

    def _cut(self) -> list[list[_Piece]]:
        every = self.turns.every
        slots: list[list[_Piece]] = [[] for _ in range(every)]
        words = sum(piece.words + CALL_WORDS for piece in self._pieces)
        filled = min(max(words // TURN_WORDS, 1), every)
        # From the first step of a run on.
        begins = ((1 + number * every // filled) % every for number in range(filled))
        loads = dict.fromkeys(begins, 0)
        for piece in self._pieces:
            slot = min(loads, key=loads.__getitem__)
            slots[slot].append(piece)
            loads[slot] += piece.words + CALL_WORDS
        return slots

    def period(self, step: int) -> int:
        """Return in how many steps up to this one each piece was looked at at least once."""
        period = len(self._slots)
        return period + self._before if step <= self._changed_at + period else period

    def agree(self, step: int, costs: Sequence[float]) -> None:
        """Hear what ranks said that looking takes; from the next step on, hold to their share."""
        before = self.period(step)
        if self.turns.agree(costs):
            self._changed_at, self._before = step, before
            self._slots = self._cut()

    def due(self, step: int) -> bool:
        """Whether something is to be digested before a step moves the weights."""
        return bool(self._slots[step % len(self._slots)])

    def look(self, step: int, held: Iterable[Held], *, whole: bool = False) -> dict[Kind, Tensor]:
        """Return the digests that are due before `step` moves the weights, or of everything.

        Scalars, int64: on a GPU nobody has waited for them.
        """
        with self.turns.looking():
            return self._look(step, held, whole=whole)

    def _look(self, step: int, held: Iterable[Held], *, whole: bool) -> dict[Kind, Tensor]:
        tensors = {each.kind: each.tensors for each in held}
        found: dict[Kind, list[Tensor]] = {}
        slots = self._slots if whole else [self._slots[step % len(self._slots)]]
        for piece in (piece for slot in slots for piece in slot):
            if piece.kind not in tensors:
                continue
            tensor = tensors[piece.kind][piece.place][1].reshape(-1)
            part = tensor[piece.start : piece.start + piece.words]
            share = digest(part, f"{piece.kind}/{piece.name}", piece.start)
            found.setdefault(piece.kind, []).append(share)
        return {kind: torch.stack(shares).sum() for kind, shares in found.items()}


def period_of(words: float, flops: float, device: str, share: float) -> int:
    """Return in how many steps all is to be looked at once, to take that share of their time.

    As long as nobody has measured it. Follows from the job alone: all ranks of a world must come to
    the same.

    Args:
        words: that a rank holds.
        flops: operations that a rank does in a step.
        device: where it does them, as in `FLOPS_PER_WORD`.
        share: of the time of a step, above 0.

    >>> period_of(4e6, 6e9, "cpu", 0.01)
    4
    """
    return max(math.ceil(words * FLOPS_PER_WORD[device] / (share * flops)), 1)


def read(digests: dict[Kind, Tensor]) -> dict[Kind, int]:
    """Wait for digests; return them as numbers in [0, 2**64)."""
    if not digests:
        return {}
    values = torch.stack(list(digests.values())).tolist()
    return {kind: unsigned(value) for kind, value in zip(digests, values, strict=True)}


class Watched:
    """The state of a program's own model and optimizer, digested once per step for its worker.

    If that raises, it is said, and training goes on without. On a GPU, `trainer.digest.fuse` before
    the first step has it take a twentieth of the time.

        watched = Watched(model, optimizer, worker)
        for step in ...:
            loss.backward()            # and whatever adds gradients up over ranks
            watched.before(step)
            optimizer.step()

    Args:
        model: whose parameters are compared with those of the ranks that hold the same shard.
        optimizer: whose state goes with them, as far as it has got any.
        worker: who is told.
        period: in how many steps all is looked at once; the same on every rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        worker: Hears,
        *,
        period: int = 1,
    ) -> None:
        self._model, self._optimizer, self._worker = model, optimizer, worker
        self._period = period
        self._guard = Guard("digests")
        self._watch: Watch | None = None
        self._kinds: tuple[Kind, ...] = ()

    @torch.no_grad()
    def before(self, step: int) -> None:
        """Digest what is due right before optimizer step `step` (1-based), and report it."""
        taken = Taken(step=Step(step), period=self._period)
        self._worker.digested(taken, self._guard.call(lambda: self._digests(step), {}))
        self._guard.tell(self._worker)

    def _digests(self, step: int) -> dict[Kind, int]:
        held = list(self._held())
        kinds = tuple(each.kind for each in held)
        if self._watch is None or kinds != self._kinds:
            # The first step of an optimizer makes its state.
            self._watch, self._kinds = Watch(held, Turns.fixed(self._period)), kinds
        return read(self._watch.look(step, held))

    def _held(self) -> Iterator[Held]:
        weights = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        yield Held("weights", [(name, _own(weight)) for name, weight in weights])
        kinds: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
        for kind in kinds:
            known = [
                (name, _own(self._optimizer.state[weight][kind]))
                for name, weight in weights
                if kind in self._optimizer.state.get(weight, {})
            ]
            if len(known) == len(weights):
                yield Held(kind, known)
        gradients = [(name, _own(w.grad)) for name, w in weights if w.grad is not None]
        if len(gradients) == len(weights):
            yield Held("gradient", gradients)


def _own(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor; of one that is not sharded, all of it."""
    local = getattr(tensor, "to_local", None)
    found = local() if local is not None else tensor
    assert isinstance(found, Tensor)
    return found.detach()


def _pieces(held: Iterable[Held]) -> Iterator[_Piece]:
    for kind, tensors in held:
        for place, (name, tensor) in enumerate(tensors):
            at_once = PIECE_WORDS_ON_GPUS if tensor.is_cuda else PIECE_WORDS
            for start in range(0, tensor.numel(), at_once):
                words = min(at_once, tensor.numel() - start)
                yield _Piece(kind, name, place, start, words)
