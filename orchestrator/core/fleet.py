"""The fleet as columns: what is known of every rank of the current world, one array per fact.

16,384 ranks are a few hundred kilobytes here and one vector operation per tick; an object per
rank and heartbeat would be billions over a run. Letters in array names: R ranks of the world.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orchestrator.protocol.ids import Rank, Seconds, Step
from orchestrator.protocol.messages import GroupCounts
from orchestrator.protocol.phases import RankPhase

_PATIENT = np.array([phase.patient for phase in RankPhase])


GROUPS_MAX = 16
"""Process groups that are kept for each rank of the world: a beacon has room for as many."""


class _Columns:
    """One array per fact, each of shape [R]."""

    def __init__(self, world_size: int, at: Seconds) -> None:
        self.phase_R = np.zeros(world_size, np.int64)
        self.step_R = np.full(world_size, -1, np.int64)
        self.progress_R = np.full(world_size, -1, np.int64)
        self.cpu_s_R = np.zeros(world_size)
        self.cpu_at_move_s_R = np.zeros(world_size)
        self.moved_at_R = np.full(world_size, at)
        self.stopped_since_R = np.full(world_size, np.inf)
        self.letter_R = np.full(world_size, ord("?"), np.uint8)


class _Row(NamedTuple):
    """What is known of each rank while that is the same of all of them."""

    phase: int
    step: int
    progress: int
    state: str
    cpu_s: float
    cpu_at_move_s: float
    moved_at: Seconds
    stopped_since: float


class Fleet:
    """What telemetry has said about the ranks of one generation.

    Attributes:
        last_moved_at: when any of them moved last, or was forgiven for standing still.
        stopped_since: since when the kernel has shown any process as stopped; inf if it shows none.
    """

    def __init__(self, world_size: int, at: Seconds) -> None:
        self._columns = _Columns(world_size, at)
        self._told: dict[str, tuple[tuple[float, ...], npt.NDArray[Any]]] = {}
        """The newest columns that were told, and what became of them."""
        self._row: _Row | None = None
        """Of all ranks, if it is newer than the columns."""
        self.last_moved_at = at
        self.stopped_since = math.inf
        self._groups_max = GROUPS_MAX * world_size
        self.entered_R = np.full(world_size, -1, np.int64)
        """Collectives entered, -1 if it never said."""
        self.left_R = np.full(world_size, -1, np.int64)
        """Collectives left; one less while it waits in one."""
        self.groups: dict[tuple[str, tuple[Rank, ...]], GroupCounts] = {}
        """Collectives by process group, of ranks that stood still when it was said; newest last."""

    # Columns --------------------------------------------------------------------------------------

    @property
    def phase_R(self) -> npt.NDArray[np.int64]:
        """Index into RankPhase."""
        return self._filled().phase_R

    @property
    def step_R(self) -> npt.NDArray[np.int64]:
        """Steps completed, -1 if it never said."""
        return self._filled().step_R

    @property
    def progress_R(self) -> npt.NDArray[np.int64]:
        """Signs of life, -1 if there was none."""
        return self._filled().progress_R

    @property
    def cpu_s_R(self) -> npt.NDArray[np.float64]:
        """Processor seconds."""
        return self._filled().cpu_s_R

    @property
    def cpu_at_move_s_R(self) -> npt.NDArray[np.float64]:
        """Processor seconds when the rank last moved: the difference says who is spinning."""
        return self._filled().cpu_at_move_s_R

    @property
    def moved_at_R(self) -> npt.NDArray[np.float64]:
        """When the rank last moved."""
        return self._filled().moved_at_R

    @property
    def stopped_since_R(self) -> npt.NDArray[np.float64]:
        """Since when the kernel has shown the process as stopped; inf if it does not."""
        return self._filled().stopped_since_R

    def _filled(self) -> _Columns:
        """Return the columns with what was told of all ranks alike."""
        columns, row = self._columns, self._row
        if row is not None:
            self._row = None
            columns.phase_R[:], columns.step_R[:] = row.phase, row.step
            columns.progress_R[:], columns.letter_R[:] = row.progress, ord(row.state)
            columns.cpu_s_R[:], columns.cpu_at_move_s_R[:] = row.cpu_s, row.cpu_at_move_s
            columns.moved_at_R[:], columns.stopped_since_R[:] = row.moved_at, row.stopped_since
        return columns

    # Telemetry ------------------------------------------------------------------------------------

    def observe(
        self,
        at: Seconds,
        *,
        phases: tuple[int, ...],
        steps: tuple[int, ...],
        progress: tuple[int, ...],
        states: str,
        cpu_s: tuple[float, ...],
    ) -> None:
        """Take in one tick of columns over all ranks; -1 and "?" leave a rank as it was.

        A column of length one says the same of every rank.
        """
        told = (phases, steps, progress, states, cpu_s)
        if progress[0] >= 0 and all(len(column) == 1 for column in told):
            self._observe_alike(at, phases[0], steps[0], progress[0], states, cpu_s[0])
            return
        columns = self._filled()
        progress_R = self._array("progress", progress, np.int64)
        known_R = progress_R >= 0
        moved_R = known_R & (progress_R != columns.progress_R)
        cpu_R = self._array("cpu_s", cpu_s, np.float64)
        phase_R, step_R = (
            self._array("phase", phases, np.int64),
            self._array("step", steps, np.int64),
        )
        # In place: at this size, a new array is new memory from the kernel each time.
        np.copyto(columns.phase_R, phase_R, where=known_R)
        np.copyto(columns.step_R, step_R, where=known_R)
        np.copyto(columns.progress_R, progress_R, where=known_R)
        np.copyto(columns.cpu_s_R, cpu_R, where=known_R)
        np.copyto(columns.moved_at_R, at, where=moved_R)
        np.copyto(columns.cpu_at_move_s_R, cpu_R, where=moved_R)
        # Not every tick hears of every rank: what is unknown is as it was.
        letter_R = np.frombuffer(states.encode("ascii", "replace"), np.uint8)
        np.copyto(columns.letter_R, letter_R, where=known_R)
        shown_R = (columns.letter_R == ord("T")) | (columns.letter_R == ord("t"))
        self._stop(columns, at, shown_R & ~moved_R)
        if bool(moved_R.any()):
            self.last_moved_at = at

    def join(self, entered: tuple[int, ...], left: tuple[int, ...]) -> None:
        """Take in how many collectives ranks have entered and left; -1 leaves a rank as it was."""
        if len(entered) == len(left) == 1 and entered[0] < 0:
            return
        entered_R = np.asarray(entered, np.int64)
        known_R = entered_R >= 0
        np.copyto(self.entered_R, entered_R, where=known_R)
        np.copyto(self.left_R, np.asarray(left, np.int64), where=known_R)

    def count(self, rows: tuple[GroupCounts, ...]) -> None:
        """Take in in which collectives ranks stand; a node says the same groups every time."""
        for row in rows:
            key = row.group, row.ranks
            if self.groups.pop(key, None) is None and len(self.groups) >= self._groups_max:
                continue  # more than anybody has: it is not worth memory without end
            self.groups[key] = row

    def _array(
        self, name: str, column: tuple[float, ...], kind: type[np.generic]
    ) -> npt.NDArray[Any]:
        """Return a column as an array, to be read: the same one while the same is told."""
        known = self._told.get(name)
        if known is None or (known[0] is not column and known[0] != column):
            known = self._told[name] = (column, np.asarray(column, kind))
        return known[1]

    def _observe_alike(
        self, at: Seconds, phase: int, step: int, progress: int, state: str, cpu_s: float
    ) -> None:
        """Take in one tick in which every rank does the same: nearly every one."""
        if self._row is not None:
            row = self._row
            moved = row.progress != progress
            stopped = state in "Tt" and not moved
            self._row = _Row(
                phase, step, progress, state, cpu_s,
                cpu_at_move_s=cpu_s if moved else row.cpu_at_move_s,
                moved_at=at if moved else row.moved_at,
                stopped_since=min(row.stopped_since, at) if stopped else math.inf,
            )  # fmt: skip
            self.stopped_since = self._row.stopped_since
            self.last_moved_at = self._row.moved_at
            return
        columns = self._columns
        moved_R = columns.progress_R != progress
        if bool(moved_R.all()):
            self._row = _Row(phase, step, progress, state, cpu_s, cpu_s, at, math.inf)
            self.last_moved_at, self.stopped_since = at, math.inf
            return
        columns.phase_R[:], columns.step_R[:], columns.progress_R[:] = phase, step, progress
        columns.cpu_s_R[:], columns.letter_R[:] = cpu_s, ord(state)
        columns.moved_at_R[moved_R] = at
        columns.cpu_at_move_s_R[moved_R] = cpu_s
        self._stop(columns, at, ~moved_R if state in "Tt" else np.zeros_like(moved_R))
        if bool(moved_R.any()):
            self.last_moved_at = at

    def _stop(self, columns: _Columns, at: Seconds, stopped_R: npt.NDArray[np.bool_]) -> None:
        """Enter which processes are shown as stopped, and have not moved."""
        since_R = columns.stopped_since_R
        if math.isinf(self.stopped_since) and not bool(stopped_R.any()):
            return
        np.minimum(since_R, at, out=since_R)
        np.copyto(since_R, np.inf, where=~stopped_R)
        self.stopped_since = float(since_R.min())

    @property
    def states(self) -> str:
        """Return the kernel's process state of each rank, one letter each, "?" where unknown."""
        return self._filled().letter_R.tobytes().decode("ascii")

    def state_of(self, rank: Rank) -> str:
        """Return the kernel's process state of a rank."""
        return chr(self._filled().letter_R[rank])

    def forgive(self, at: Seconds) -> None:
        """Count standing still from `at` on: until then nobody was looking."""
        columns = self._filled()
        np.maximum(columns.moved_at_R, at, out=columns.moved_at_R)
        np.copyto(columns.stopped_since_R, at, where=np.isfinite(columns.stopped_since_R))
        self.last_moved_at = max(self.last_moved_at, at)
        self.stopped_since = math.inf if math.isinf(self.stopped_since) else at

    @property
    def alike(self) -> bool:
        """Whether all ranks do the same, as far as is known."""
        return self._row is not None

    def still_s(self, phase: RankPhase, now: Seconds) -> float | None:
        """Return the longest that a rank in a phase has stood still, seconds; None if none is."""
        if self._row is not None:
            return now - self._row.moved_at if self._row.phase == phase else None
        there_R = self._columns.phase_R == phase
        return now - float(self._columns.moved_at_R[there_R].min()) if there_R.any() else None

    def patient_R(self) -> npt.NDArray[np.bool_]:
        """Return which ranks announced a phase in which standing still is no hang."""
        return _PATIENT[np.clip(self.phase_R, 0, len(_PATIENT) - 1)]

    def step_of(self, rank: Rank) -> Step:
        """Return the steps that a rank has completed; 0 if it never said."""
        return Step(max(int(self.step_R[rank]), 0))


class StepTimes:
    """Step times as they are learned; the basis of every limit on standing still."""

    def __init__(self, window: int = 512) -> None:
        self._recent: deque[float] = deque(maxlen=window)

    def learn(self, seconds: float) -> None:
        """Take in the duration of one healthy step."""
        self._recent.append(seconds)

    def stretch(self, factor: float) -> None:
        """Have all that was learned be longer by a factor: steps will be."""
        self._recent = deque((s * factor for s in self._recent), maxlen=self._recent.maxlen)

    @property
    def known(self) -> int:
        """How many steps the estimate rests on."""
        return len(self._recent)

    def quantile(self, q: float) -> float:
        """Return the q-quantile in seconds; 0 before the first step.

        With fewer than 100 steps the largest stands in for high quantiles.
        """
        if not self._recent:
            return 0.0
        # Asked for at every tick: for a few hundred numbers this beats numpy's by far.
        ordered = sorted(self._recent)
        return ordered[math.ceil(q * (len(ordered) - 1))]
