"""Gathers what ranks digested until all have said it, or had the time to, and compares it once.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from orchestrator.detect import votes
from orchestrator.detect.votes import Votes
from orchestrator.protocol.digests import HEX_DIGITS, KINDS, Digests, Kind, Taken
from orchestrator.protocol.ids import Generation, NodeId, Rank, Step
from orchestrator.protocol.layout import Layout
from orchestrator.protocol.messages import StateDiverged

PATIENCE = 3
"""Looks for which a step waits for ranks that said nothing of it; then it is compared as it is. A
look comes with each beat, and what a lost beat had with it is never said again."""
PENDING_MIN = 64
"""Steps that may wait in any world."""
PENDING_BYTES = 64 << 20
"""Of votes that wait, all together; of more steps than fit, the oldest are compared as they are."""
JUDGED_MAX = 4096
"""Steps of which it is known that they were compared without everybody: who is late has no vote."""

log = logging.getLogger(__name__)


class _Box:
    """What ranks said of one step."""

    def __init__(self, size: int) -> None:
        self.votes: dict[Kind, Votes] = {}
        self.missing = set(range(size))
        self.looks = 0
        """How often it was looked at in vain."""
        self._size = size

    def put(self, ranks: tuple[Rank, ...], columns: Sequence[str]) -> None:
        """Enter columns over some ranks, or nothing at all.

        Raises:
            ValueError: if they are not that.
        """
        if not all(0 <= rank < self._size for rank in ranks) or len(columns) != len(KINDS):
            raise ValueError(f"digests of ranks {ranks} in a world of {self._size}")
        values: dict[Kind, Votes] = {}
        for kind, column in zip(KINDS, columns, strict=True):
            if column:
                values[kind] = np.frombuffer(bytes.fromhex(column), ">u8")
                if len(column) != HEX_DIGITS * len(ranks):
                    raise ValueError(f"{len(values[kind])} digests of {len(ranks)} ranks")
        for kind, digests in values.items():
            if kind not in self.votes:
                self.votes[kind] = np.zeros(self._size, np.uint64)
            self.votes[kind][list(ranks)] = digests
        self.missing.difference_update(ranks)


class Compared(NamedTuple):
    """What came of the comparisons since the last time."""

    states: tuple[tuple[Step, str], ...]
    """The digest of the whole state at each step at which all agreed."""
    diverged: tuple[StateDiverged, ...]
    parts: tuple[tuple[Step, str], ...]
    """What those digests are made of (votes.parts_of_world)."""
    replayed: Step
    """The newest step of which every rank said that what it computed once more came out the same;
    0 if there is none."""


class Ballots:
    """Those of the present generation."""

    def __init__(self) -> None:
        self._boxes: dict[Taken, _Box] = {}
        self._judged: dict[Taken, None] = {}
        """Compared without everybody, the oldest first."""
        self._said: set[tuple[NodeId, ...]] = set()
        self.begin(Generation(0), Layout(), ())

    def begin(self, generation: Generation, layout: Layout, seats: tuple[NodeId, ...]) -> None:
        """Forget what an older generation said."""
        self._generation, self._layout, self._seats = generation, layout, seats
        self._boxes, self._judged, self._said = {}, {}, set()
        of_a_step = max(len(seats), 1) * len(KINDS) * np.uint64().nbytes
        self.pending_max = max(PENDING_BYTES // of_a_step, PENDING_MIN)

    def take(self, rows: Iterable[Digests]) -> None:
        """Take in what some ranks of this generation digested; what is not that is left out."""
        for row in rows:
            if row.taken in self._judged:
                continue
            box = self._boxes.get(row.taken) or _Box(len(self._seats))
            try:
                box.put(row.ranks, row.columns)
            except ValueError as error:
                log.warning("digests of step %d are left out: %s", row.taken.step, error)
            else:
                self._boxes[row.taken] = box

    def count(self, *, look: bool = True) -> Compared:
        """Compare whatever is complete, and what has waited for too long.

        Args:
            look: whether this is one of the looks that a step waits for: one comes with each beat.
        """
        states, parts, diverged, replayed = [], [], [], Step(0)
        for taken, box in list(self._ready(look=look)):
            del self._boxes[taken]
            self._close(taken, box)
            found = votes.dissents(box.votes, self._layout)
            if found:
                fact = votes.verdict(found, taken, self._generation, self._seats)
                # It shows at every step until the run has gone back.
                if fact.nodes not in self._said:
                    self._said.add(fact.nodes)
                    diverged.append(fact)
                continue
            if taken.shift and not box.missing:
                replayed = max(replayed, taken.step)
            # Of a part of the state, which part depends on how many replicas there are.
            whole = box.votes and not box.missing and not taken.discarded and taken.period == 1
            if digest := votes.of_world(box.votes, self._layout) if whole else "":
                states.append((taken.step, digest))
                parts.append((taken.step, votes.parts_of_world(box.votes, self._layout)))
        return Compared(tuple(states), tuple(diverged), tuple(parts), replayed)

    def _ready(self, *, look: bool) -> Iterator[tuple[Taken, _Box]]:
        late = len(self._boxes) - self.pending_max
        for place, (taken, box) in enumerate(self._boxes.items()):
            box.looks += look
            if not box.missing or box.looks > PATIENCE or place < late:
                yield taken, box

    def _close(self, taken: Taken, box: _Box) -> None:
        """Enter that the votes which are missing come too late."""
        if box.missing:
            self._judged[taken] = None
            if len(self._judged) > JUDGED_MAX:
                del self._judged[next(iter(self._judged))]
