"""Says which tokens of a source its samples are, also if their length changes within a run.

A sample is a window of the source's tokens. In each epoch every token is in one window, but for
fewer at the end than a window has, and windows come in an order that is computed, not stored.

Where lengths change, an epoch is cut into blocks as long as the longest sample, and those are
permuted: each stage takes windows of its own length out of the next ones, in another permutation.
So the windows of a stage are from all over the source, and none of them was seen in another. What a
stage leaves of its last block comes at the end of the epoch, where a window may have to be put
together of two pieces; all others are in one.
"""

from __future__ import annotations

import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

Span = tuple[int, int]
"""From the first to behind the last."""
Spans = tuple[Span, ...]
_STAGE_SHIFT = 32
"""Above the bits of any epoch: each stage has permutations of its own."""
_BLOCKS = 0xFFFF << _STAGE_SHIFT


class _Stretch(NamedTuple):
    """Windows of one length in one epoch, or in several that are used up alike."""

    first: int
    """The first window's number, of the source."""
    epoch: int
    windows: int
    """Of an epoch."""
    length: int
    stage: int
    spans: Spans
    """What they are cut from, of the blocks of the epoch in their order."""


class Windows:
    """The windows of one source, in the order in which a run takes them.

    Args:
        size: tokens of the source that have one after them.
        stages: the first window of each length, counted over the source, and the length; the first
            one's is 0. None is longer than the source.
        seed: of the permutations; None leaves everything as it lies.
    """

    def __init__(self, size: int, stages: Sequence[tuple[int, int]], seed: int | None) -> None:
        self._size, self._seed = size, seed
        self._block = max(length for _, length in stages)
        # With one length the windows are the blocks: to permute one of them is enough.
        self._in_order = seed is None or len(stages) == 1
        self._stretches: list[_Stretch] = []
        left: Spans = ((0, size),)
        epoch, ends = 0, [*(first for first, _ in stages[1:]), sys.maxsize]
        for stage, ((first, length), end) in enumerate(zip(stages, ends, strict=True)):
            epoch, left = self._lay_out(stage, range(first, end), length, (epoch, left))

    def _lay_out(
        self, stage: int, numbers: range, length: int, begun: tuple[int, Spans]
    ) -> tuple[int, Spans]:
        """Add the stretches of a stage; return the epoch that it ends in, and what is left of it.

        Args:
            stage: which.
            numbers: of its windows.
            length: of each.
            begun: the epoch that it begins in, and what is left of that.
        """
        (epoch, left), whole = begun, ((0, self._size),)
        at = numbers.start
        while at < numbers.stop:
            there = _total(left) // length
            if there == 0:
                epoch, left = epoch + 1, whole
                continue
            epochs = (numbers.stop - at) // there if left == whole else 0
            if epochs:
                self._stretches.append(_Stretch(at, epoch, there, length, stage, whole))
                at, epoch = at + epochs * there, epoch + epochs
                continue
            count = min(there, numbers.stop - at)
            taken, left = _cut(left, count * length)
            self._stretches.append(_Stretch(at, epoch, count, length, stage, taken))
            left = self._in_blocks(left)
            at += count
        return epoch, left

    def __call__(self, number: int) -> list[Span]:
        """Return the tokens of a window, by its number; in one piece unless lengths change."""
        stretch, epoch, place = self._find(number)
        if self._seed is not None:
            key = (self._seed, epoch | stretch.stage << _STAGE_SHIFT)
            place = shuffled(place, stretch.windows, key)
        _, behind = _cut(stretch.spans, place * stretch.length)
        window, _ = _cut(behind, stretch.length)
        return list(_joined(self._in_source(window, epoch)))

    def epoch(self, number: int) -> int:
        """Return the epoch of a window, from 0."""
        return self._find(number)[1]

    def _find(self, number: int) -> tuple[_Stretch, int, int]:
        at = bisect_right(self._stretches, number, key=lambda stretch: stretch.first) - 1
        stretch = self._stretches[at]
        turn, place = divmod(number - stretch.first, stretch.windows)
        return stretch, stretch.epoch + turn, place

    def _in_blocks(self, left: Spans) -> Spans:
        """Return what is left of an epoch with the rest of a block that was begun at its end."""
        if not left or left[0][0] % self._block == 0:
            return left
        (start, stop), *more = left
        border = min(start + -start % self._block, stop)
        return tuple(span for span in ((border, stop), *more, (start, border)) if span[0] < span[1])

    def _in_source(self, spans: Sequence[Span], epoch: int) -> Iterator[Span]:
        """Yield where pieces of an epoch's blocks lie; behind whole blocks, what is left of one."""
        if self._in_order or self._seed is None:
            yield from spans
            return
        blocks = self._size // self._block
        for start, stop in spans:
            borders = range(start - start % self._block, stop, self._block)
            for number, border in enumerate(borders, start // self._block):
                block = number
                if block < blocks:
                    block = shuffled(block, blocks, (self._seed, epoch | _BLOCKS))
                moved = block * self._block - border
                yield max(start, border) + moved, min(stop, border + self._block) + moved


def _total(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def _cut(spans: Sequence[Span], size: int) -> tuple[Spans, Spans]:
    """Return the first `size` of what spans have, and the rest.

    >>> _cut([(0, 3), (7, 9)], 4)
    (((0, 3), (7, 8)), ((8, 9),))
    """
    taken: list[Span] = []
    for number, (start, stop) in enumerate(spans):
        if stop - start >= size:
            rest = [(start + size, stop), *spans[number + 1 :]]
            taken += [(start, start + size)]
            return (
                tuple(span for span in taken if span[0] < span[1]),
                tuple(span for span in rest if span[0] < span[1]),
            )
        taken.append((start, stop))
        size -= stop - start
    return tuple(taken), ()


def _joined(spans: Iterator[Span]) -> Iterator[Span]:
    """Yield spans that follow each other as one."""
    at, end = next(spans)
    for start, stop in spans:
        if start != end:
            yield at, end
            at = start
        end = stop
    yield at, end


def shuffled(position: int, size: int, key: tuple[int, int]) -> int:
    """Return where `position` lands in a permutation of `range(size)`, one for each key.

    A Feistel network permutes the next power of four; whoever lands beyond `size` goes through it
    again. That needs no memory, however many samples there are.

    >>> sorted(shuffled(i, 10, (1, 0)) for i in range(10)) == list(range(10))
    True
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(6):
            word = struct.pack("<QQQQ", *key, turn, right)
            left, right = right, left ^ (xxhash.xxh3_64_intdigest(word) & mask)
        position = left << half | right
        if position < size:
            return position
