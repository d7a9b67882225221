"""Gathers what nodes report into columns over all ranks, one row per tick.

Letters in array names: R ranks of the world.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from orchestrator.core.events import Compared, Telemetry
from orchestrator.protocol.ids import Generation, NodeId, Rank, Seconds, Step
from orchestrator.protocol.messages import Beat, DetectorFailed, GroupCounts, StepReport
from orchestrator.worlds.ballots import Ballots

log = logging.getLogger(__name__)
V = TypeVar("V")


class _Paces(NamedTuple):
    """What ranks of a node computed in a step, and for how long, as a beat says it."""

    ranks: tuple[Rank, ...]
    compute_s: tuple[float, ...]
    busy_s: tuple[float, ...]
    work: tuple[float, ...]


class Columns:
    """Beats of all nodes since the last tick."""

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self._generation = Generation(0)
        self.reported = Step(0)
        """Last step of this generation that has been passed on, or is about to be."""
        self._reports: list[StepReport] = []
        self.ballots = Ballots()
        """What of these beats is compared."""
        self._digests: list[tuple[Step, str]] = []
        self._parts: list[tuple[Step, str]] = []
        self._replayed = Step(0)
        """Newest step that all ranks said to have come out the same elsewhere, until it is told."""
        self._uncomparable: DetectorFailed | None = None
        """Why digests of this generation are not compared any more."""
        self._told = False
        """Whether that was passed on."""
        self._heard: set[NodeId] = set()
        self._stall_s_R: dict[Rank, float] = {}
        self._paces: dict[NodeId, _Paces] = {}
        """What each node said last of what its ranks computed in a step, and for how long."""
        self._stalls: dict[NodeId, tuple[tuple[Rank, ...], tuple[float, ...]]] = {}
        """What each node said last of how long its ranks have stalled."""
        self._rows: dict[tuple[Rank, ...], slice | None] = {}
        self._stalled_s = 0.0
        self._clear()

    def begin(self, generation: Generation, restored: Step, world_size: int) -> None:
        """Forget what an older generation said; steps count from `restored` on."""
        self._generation, self._size = generation, world_size
        self.reported = restored
        self._reports, self._digests, self._parts, self._replayed = [], [], [], Step(0)
        self._uncomparable, self._told = None, False
        self._stall_s_R, self._stalls, self._rows = {}, {}, {}
        self._paces = {}
        self._stalled_s = 0.0
        self._clear()

    def take(self, node: NodeId, beat: Beat) -> None:
        """Take in a beat; of an older generation only that the node was heard."""
        self._heard.add(node)
        if beat.generation != self._generation:
            return
        self._enter(beat)
        self._join(beat)
        for row in beat.groups:
            self._count(row)
        if len(beat.compute_s) == len(beat.busy_s) == len(beat.work) == len(beat.ranks):
            self._paces[node] = _Paces(beat.ranks, beat.compute_s, beat.busy_s, beat.work)
        told = (beat.ranks, beat.stall_s)
        if self._stalls.get(node) != told:
            self._stalls[node] = told
            self._count_stalls(beat)
        for report in beat.reports:
            if report.step > self.reported:
                self.reported = report.step
                self._reports.append(report)
        if self._uncomparable is None:
            try:
                self.ballots.take(beat.digests)
            except Exception as error:  # noqa: BLE001 - a broken detector must not stop training
                self._compare_no_more(error)

    def compared(self, at: Seconds, *, look: bool = True) -> Iterator[Compared]:
        """Yield what ranks turn out to hold that should not be; the rest goes with telemetry.

        What can not be compared is said once, and nothing is until the next generation. `look`:
        whether who said nothing had a beat's time for it since the last look.
        """
        if self._uncomparable is None:
            try:
                states, diverged, parts, replayed = self.ballots.count(look=look)
            except Exception as error:  # noqa: BLE001 - a broken detector must not stop training
                self._compare_no_more(error)
            else:
                self._digests += states
                self._parts += parts
                self._replayed = max(self._replayed, replayed)
                for fact in diverged:
                    yield Compared(at=at, fact=fact)
        if self._uncomparable is not None and not self._told:
            self._told = True
            yield Compared(at=at, fact=self._uncomparable)

    def _compare_no_more(self, error: Exception) -> None:
        log.error("digests are not compared any more in this generation", exc_info=error)
        self._uncomparable = DetectorFailed(
            generation=self._generation,
            ranks=(),
            detector="comparison",
            reason=f"{type(error).__name__}: {error}",
        )

    def _enter(self, beat: Beat) -> None:
        """Enter what a node says of its ranks where they are in the columns."""
        ranks, phases, steps, progress = beat.ranks, beat.phases, beat.steps, beat.progress
        states, cpu_s, count = beat.states, beat.cpu_s, len(beat.ranks)
        whole = len(phases) == len(steps) == len(progress) == len(states) == len(cpu_s) == count
        if whole and (row := self._row(ranks)) is not None:
            # So it nearly always is, a thousand times a second.
            self._phases[row], self._steps[row], self._progress[row] = phases, steps, progress
            self._states[row], self._cpu_s[row] = states, cpu_s
            return
        for place, rank in enumerate(ranks):
            if 0 <= rank < self._size:
                self._phases[rank] = beat.phases[place]
                self._steps[rank] = beat.steps[place]
                self._progress[rank] = beat.progress[place]
                self._states[rank] = beat.states[place]
                self._cpu_s[rank] = beat.cpu_s[place]

    def _join(self, beat: Beat) -> None:
        """Enter in which collective a node says that its ranks are."""
        ranks, entered, left = beat.ranks, beat.entered, beat.left
        if not len(entered) == len(left) == len(ranks):
            return
        if (row := self._row(ranks)) is not None:
            self._entered[row], self._left[row] = entered, left
            return
        for rank, came, went in zip(ranks, entered, left, strict=True):
            if 0 <= rank < self._size:
                self._entered[rank], self._left[rank] = came, went

    def _count(self, row: GroupCounts) -> None:
        """Enter in which collective of a group ranks stand, unless that is nonsense."""
        inside = row.ranks and min(row.ranks) >= 0 and max(row.ranks) < self._size
        told = len(row.what) in (0, len(row.ranks))
        if inside and told and len(row.entered) == len(row.left) == len(row.ranks):
            self._groups.append(row)

    def _row(self, ranks: tuple[Rank, ...]) -> slice | None:
        """Return where these ranks lie in the columns; None if that is not one place after another.

        Nodes have the same ranks for a whole generation.
        """
        if ranks not in self._rows:
            first = ranks[0] if ranks else Rank(0)
            end = first + len(ranks)
            in_row = first >= 0 and end <= self._size and ranks == tuple(range(first, end))
            self._rows[ranks] = slice(first, end) if in_row else None
        return self._rows[ranks]

    def _count_stalls(self, beat: Beat) -> None:
        for place, rank in enumerate(beat.ranks):
            if 0 <= rank < self._size:
                stall_s = beat.stall_s[place]
                # A rank's first beat says how long it stalled before anybody counted.
                before_s = self._stall_s_R.get(rank, stall_s)
                self._stalled_s = max(self._stalled_s, stall_s - before_s)
                self._stall_s_R[rank] = stall_s

    def telemetry(self, at: Seconds) -> Telemetry | None:
        """Return everything since the last tick as one event; None if nobody was heard."""
        if not self._heard and not self._reports:
            return None
        compute_s, busy_s, work = self._computed()
        event = Telemetry(
            at=at,
            generation=self._generation,
            heard=tuple(sorted(self._heard)),
            phases=_column(self._phases),
            steps=_column(self._steps),
            progress=_column(self._progress),
            states="".join(_column(self._states)),
            cpu_s=_column(self._cpu_s),
            stall_s=self._stalled_s,
            entered=_column(self._entered),
            left=_column(self._left),
            compute_s=compute_s,
            busy_s=busy_s,
            work=work,
            reports=tuple(self._reports),
            digests=tuple(self._digests),
            parts=tuple(self._parts),
            replayed=self._replayed,
            groups=tuple(self._groups),
        )
        self._reports, self._digests, self._parts, self._replayed = [], [], [], Step(0)
        self._stalled_s = 0.0
        self._clear()
        return event

    def _computed(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """Return seconds that each rank computed in its last step, and what; 0 where unknown."""
        compute_s, busy_s, work = ([0.0] * self._size for _ in range(3))
        for paces in self._paces.values():
            for rank, *of_rank in zip(*paces, strict=True):
                if 0 <= rank < self._size:
                    compute_s[rank], busy_s[rank], work[rank] = of_rank
        return _column(compute_s), _column(busy_s), _column(work)

    def flush(self, at: Seconds) -> Iterator[Telemetry | Compared]:
        """Yield what there is ahead of the tick, if it has steps in it."""
        yield from self.compared(at, look=False)
        if self._reports:
            event = self.telemetry(at)
            assert event is not None
            yield event

    def _clear(self) -> None:
        self._heard = set()
        self._phases = [-1] * self._size
        self._steps = [-1] * self._size
        self._progress = [-1] * self._size
        self._states = ["?"] * self._size
        self._entered = [-1] * self._size
        self._left = [-1] * self._size
        self._cpu_s = [0.0] * self._size
        self._groups: list[GroupCounts] = []


def _column(values: list[V]) -> tuple[V, ...]:
    """Return a column over all ranks; one value, if it is the same for all of them."""
    if values.count(values[0]) == len(values):
        return (values[0],)
    return tuple(values)
