"""Gathers what ranks digested until all have said it, and compares it once.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from orchestrator.detect import votes
from orchestrator.detect.votes import Votes
from orchestrator.protocol.digests import HEX_DIGITS, KINDS, Digests, Kind, Taken
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import StateDiverged

PENDING_MAX = 64
"""Steps that wait for ranks which said nothing of them; what is older is compared as it is."""


class _Box:
    """What ranks said of one step."""

    def __init__(self, size: int) -> None:
        self.votes: dict[Kind, Votes] = {}
        self.missing = set(range(size))
        self._size = size

    def put(self, ranks: tuple[Rank, ...], columns: Sequence[str]) -> None:
        """Enter columns over some ranks.

        Raises:
            ValueError: if they are not that.
        """
        if not all(0 <= rank < self._size for rank in ranks) or len(columns) != len(KINDS):
            raise ValueError(f"digests of ranks {ranks} in a world of {self._size}")
        for kind, column in zip(KINDS, columns, strict=True):
            if column:
                values = np.frombuffer(bytes.fromhex(column), ">u8")
                if len(column) != HEX_DIGITS * len(ranks):
                    raise ValueError(f"{len(values)} digests of {len(ranks)} ranks")
                if kind not in self.votes:
                    self.votes[kind] = np.zeros(self._size, np.uint64)
                self.votes[kind][list(ranks)] = values
        self.missing.difference_update(ranks)


class Compared(NamedTuple):
    """What came of the comparisons since the last time."""

    states: tuple[tuple[Step, str], ...]
    """The digest of the whole state at each step at which all agreed."""
    diverged: tuple[StateDiverged, ...]


class Ballots:
    """Those of the present generation."""

    def __init__(self) -> None:
        self._boxes: dict[Taken, _Box] = {}
        self._said: set[tuple[NodeId, ...]] = set()
        self.begin(Generation(0), Layout(), ())

    def begin(self, generation: Generation, layout: Layout, seats: tuple[NodeId, ...]) -> None:
        """Forget what an older generation said."""
        self._generation, self._layout, self._seats = generation, layout, seats
        self._boxes, self._said = {}, set()

    def take(self, rows: Iterable[Digests]) -> None:
        """Take in what some ranks of this generation digested.

        Raises:
            ValueError: if that is not what it should be.
        """
        for row in rows:
            if row.taken not in self._boxes:
                self._boxes[row.taken] = _Box(len(self._seats))
            self._boxes[row.taken].put(row.ranks, row.columns)

    def count(self) -> Compared:
        """Compare whatever is complete, and what has waited for too long."""
        states, diverged = [], []
        for taken, box in list(self._ready()):
            del self._boxes[taken]
            found = votes.dissents(box.votes, self._layout)
            if found:
                fact = votes.verdict(found, taken, self._generation, self._seats)
                # It shows at every step until the run has gone back.
                if fact.nodes not in self._said:
                    self._said.add(fact.nodes)
                    diverged.append(fact)
                continue
            # Of a part of the state, which part depends on how many replicas there are.
            whole = not box.missing and not taken.discarded and taken.period == 1
            if digest := votes.of_world(box.votes, self._layout) if whole else "":
                states.append((taken.step, digest))
        return Compared(tuple(states), tuple(diverged))

    def _ready(self) -> Iterator[tuple[Taken, _Box]]:
        late = len(self._boxes) - PENDING_MAX
        for place, (taken, box) in enumerate(self._boxes.items()):
            if not box.missing or place < late:
                yield taken, box
